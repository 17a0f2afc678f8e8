"""A checkpoint of SD 1.5's real shapes with random weights, 2 GB, for a real ComfyUI, which is on PYTHONPATH.

python make_checkpoint.py FILE
"""

import sys
import time

import torch
from safetensors.torch import save_file
from transformers import CLIPTextConfig, CLIPTextModel


def main(file):
    from comfy.cli_args import args

    args.cpu = True  # read once, when the next ones are imported
    import comfy.ops
    from comfy.ldm.modules.diffusionmodules.model import Decoder, Encoder
    from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel

    began = time.perf_counter()
    UNET = dict(
        image_size=32,
        in_channels=4,
        out_channels=4,
        model_channels=320,
        num_res_blocks=[2, 2, 2, 2],
        channel_mult=[1, 2, 4, 4],
        transformer_depth=[1, 1, 1, 1, 1, 1, 0, 0],
        transformer_depth_output=[1] * 9 + [0] * 3,
        transformer_depth_middle=1,
        use_linear_in_transformer=False,
        context_dim=768,
        num_heads=8,
        num_head_channels=-1,
        use_spatial_transformer=True,
        legacy=False,
    )
    VAE = dict(
        double_z=True,
        z_channels=4,
        resolution=256,
        in_channels=3,
        out_ch=3,
        ch=128,
        ch_mult=[1, 2, 4, 4],
        num_res_blocks=2,
        attn_resolutions=[],
        dropout=0.0,
    )
    with torch.device("meta"):
        unet = UNetModel(**UNET, operations=comfy.ops.disable_weight_init)
        text = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=49408, hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12
            )
        )
        encoder, decoder = Encoder(**VAE), Decoder(**VAE)
    text = getattr(text, "text_model", text)
    shapes = {f"model.diffusion_model.{k}": v.shape for k, v in unet.named_parameters()}
    shapes |= {f"cond_stage_model.transformer.text_model.{k}": v.shape for k, v in text.named_parameters()}
    for name, module in (("encoder", encoder), ("decoder", decoder)):
        shapes |= {f"first_stage_model.{name}.{k}": v.shape for k, v in module.named_parameters()}
    for name, n in (("quant_conv", 8), ("post_quant_conv", 4)):
        shapes |= {f"first_stage_model.{name}.weight": (n, n, 1, 1), f"first_stage_model.{name}.bias": (n,)}
    torch.manual_seed(0)
    state = {}
    for name, shape in shapes.items():
        if len(shape) == 1:
            state[name] = (torch.ones if name.endswith("weight") else torch.zeros)(shape, dtype=torch.float16)
        else:
            fan = 1
            for side in shape[1:]:
                fan *= side
            scale = 0.02 if "embedding" in name else 0.7 / fan**0.5
            state[name] = (torch.rand(shape) * 2 - 1).mul_(1.7 * scale).half()
    state["cond_stage_model.transformer.text_model.embeddings.position_ids"] = torch.arange(77)[None]
    save_file(state, file)
    print(
        f"checkpoint: {sum(t.nbytes for t in state.values()) / 1e9:.2f} GB in {time.perf_counter() - began:.0f} s",
        flush=True,
    )


if __name__ == "__main__":
    main(sys.argv[1])
