"""ComfyUI's own trainer, its node *Train LoRA*, called as the graph calls it: for what stands beside ours."""

import torch

from . import with_host


def train(
    graph, image: torch.Tensor, prompt: str, *, steps: int, batch_size: int, learning_rate: float, rank: int, seed: int
):
    """Return MODEL, CLIP and VAE after the host's trainer has learned one image by one prompt, in float32.

    Args:
        graph: MODEL, CLIP and VAE.
        image: `[3, H, W]` in 0..1.
        batch_size: how many passes of the one image, whose gradients a step collects.
    """
    import comfy.sd
    from comfy_extras.nodes_train import TrainLoraNode

    model, clip, vae = graph
    values = {
        "batch_size": 1, "grad_accumulation_steps": batch_size, "steps": steps, "learning_rate": learning_rate,
        "rank": rank, "seed": seed, "optimizer": "AdamW", "loss_function": "MSE", "training_dtype": "fp32",
        "lora_dtype": "fp32", "quantized_backward": False, "algorithm": "LoRA", "gradient_checkpointing": False,
        "checkpoint_depth": 1, "offloading": False, "existing_lora": "[None]", "bucket_mode": False,
        "bypass_mode": False,
    }  # fmt: skip
    # In inference mode, as a node runs; and the node ends what with_host.py has begun, so it is brought back.
    with torch.inference_mode(), with_host.of_pack("nodes.host.session").operations_with_gradients():
        latents = {"samples": vae.encode(image.movedim(0, -1)[None])}
        positive = clip.encode_from_tokens_scheduled(clip.tokenize(prompt))
        lists = {name: [value] for name, value in values.items()}
        lora, *_ = TrainLoraNode.execute(model=[model], latents=[latents], positive=[positive], **lists).result
        return *comfy.sd.load_lora_for_models(model, clip, lora, 1.0, 1.0), vae
