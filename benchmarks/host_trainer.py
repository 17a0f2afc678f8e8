"""ComfyUI's own trainer, its node *Train LoRA*, called as the graph calls it: for what stands beside ours."""

import importlib
from dataclasses import dataclass

import torch


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What both trainers are given alike; a step of the host's collects the gradients of `batch_size` single images."""

    steps: int
    batch_size: int
    learning_rate: float
    rank: int
    seed: int


def train(graph, picture: torch.Tensor, prompt: str, settings: Settings):
    """MODEL, CLIP and VAE after the host's trainer has learned one picture by one prompt, in float32.

    Args:
        graph: MODEL, CLIP and VAE.
        picture: (3, H, W) in [0, 1].
    """
    import comfy.model_management
    import comfy.sd

    node = importlib.import_module("comfy_extras.nodes_train").TrainLoraNode
    model, clip, vae = graph
    values = {
        "batch_size": 1, "grad_accumulation_steps": settings.batch_size, "steps": settings.steps,
        "learning_rate": settings.learning_rate, "rank": settings.rank, "seed": settings.seed, "optimizer": "AdamW",
        "loss_function": "MSE", "training_dtype": "fp32", "lora_dtype": "fp32", "quantized_backward": False,
        "algorithm": "LoRA", "gradient_checkpointing": False, "checkpoint_depth": 1, "offloading": False,
        "existing_lora": "[None]", "bucket_mode": False, "bypass_mode": False,
    }  # fmt: skip
    with torch.inference_mode():  # as a node runs
        latents = {"samples": vae.encode(picture.movedim(0, -1)[None])}
        positive = clip.encode_from_tokens_scheduled(clip.tokenize(prompt))
        lists = {name: [value] for name, value in values.items()}
        lora, *_ = node.execute(model=[model], latents=[latents], positive=[positive], **lists).result
        trained, clip = comfy.sd.load_lora_for_models(model, clip, lora, 1.0, 1.0)
    comfy.model_management.in_training = True  # with_host.py's; the node has ended it
    return trained, clip, vae
