"""Memory of a LoRA's training on the transformers people run, counted at their real shape. Nothing is measured.

    python -m benchmarks.with_host COMFYUI counted_native

ComfyUI's own modules with the shapes of the published files stand on PyTorch's meta device, which has no memory: the
base's weights in bfloat16 or float8, a LoRA of rank 16 on the linear layers of all blocks, AdamW, one image and 128
tokens of text. What autograd keeps is counted as Train counts it (`trainers/training/memory.py`), at the full size;
of attention what a fused kernel keeps. Text encoder and autoencoder are not on the card while it trains. It fits where
the sum, with the margin that Train adds, is not above 10^9 bytes for each GB of the card: 7 % are left to the driver.
"""

import importlib
from types import SimpleNamespace

import torch

from trainers.models import flow
from trainers.training import memory, optimizers, trainables

GIB, CARDS, TOKENS, RANK = 2**30, (12, 16, 24), 128, 16
Z_IMAGE = {
    "image_model": "lumina2", "patch_size": 2, "in_channels": 16, "dim": 3840, "cap_feat_dim": 2560, "n_layers": 30,
    "qk_norm": True, "n_heads": 30, "n_kv_heads": 30, "axes_dims": [32, 48, 48], "axes_lens": [1536, 512, 512],
    "rope_theta": 256.0, "ffn_dim_multiplier": 8.0 / 3.0, "z_image_modulation": True, "time_scale": 1000.0,
    "pad_tokens_multiple": 32,
}  # fmt: skip
# Name: the host's class, its transformer's arguments, the width of its text, whether latents are those of a video.
LAYOUTS = {
    "Z-Image": ("ZImage", Z_IMAGE, 2560, False),
    "Qwen-Image": ("QwenImage", {"image_model": "qwen_image", "in_channels": 64, "num_layers": 60}, 3584, True),
}


class Fused(torch.autograd.Function):
    """Attention that keeps what a fused kernel keeps: queries, keys, values and the output."""

    @staticmethod
    def forward(ctx, q, k, v):
        output = torch.empty_like(q)
        ctx.save_for_backward(q, k, v, output)
        return output


def fused(q, k, v, heads, mask=None, skip_reshape=False, **others):
    """Stand in for the host's attention; with `skip_reshape` inputs are `[n, heads, tokens, d]`."""
    output = Fused.apply(q, k, v)
    return output.transpose(1, 2).flatten(2) if skip_reshape else output


def network(family: str, base: torch.dtype) -> torch.nn.Module:
    """A family's frozen transformer without memory, that computes in bfloat16."""
    supported = importlib.import_module("comfy.supported_models")
    kind, layout, *_ = LAYOUTS[family]
    config = getattr(supported, kind)(dict(layout))
    config.set_inference_dtype(base, None if base == torch.bfloat16 else torch.bfloat16)
    return config.get_model({}, device="meta").diffusion_model.requires_grad_(False).eval()


def counted(family: str, base: torch.dtype, size: int) -> dict[str, int]:
    """Bytes of the weights, of the LoRA with gradients and moments, and of what autograd keeps, without and with
    gradient checkpointing."""
    module = network(family, base)
    weights = sum(parameter.nbytes for parameter in module.parameters())
    lists = SimpleNamespace(unet=module)
    lora = trainables.add_lora(module, trainables.layers(lists), RANK, RANK, torch.Generator())
    found = {"weights": weights, "LoRA": sum(p.numel() for p in lora) * optimizers.BYTES_PER_VALUE["adamw"]}
    inputs = made_inputs(family, size)
    kept = lambda: memory._kept_bytes(lambda: module(*inputs), module.parameters(), lambda tensor: False)  # noqa: E731
    found["kept"] = kept()
    blocks = flow.blocks(module)
    for block in blocks:
        block.forward = flow._Checkpointed(block, False, SimpleNamespace(levels=torch.ones(1)))
    found["kept, checkpointing"] = kept() + found["kept"] // len(blocks)
    return found


def made_inputs(family: str, size: int) -> tuple:
    """The transformer's arguments for one image of `size` pixels on a side."""
    *_, width, video = LAYOUTS[family]
    shape = (1, 16, 1, size // 8, size // 8) if video else (1, 16, size // 8, size // 8)
    like = {"device": "meta", "dtype": torch.bfloat16}
    parts = torch.empty(shape, **like), torch.ones(1, **like), torch.empty(1, TOKENS, width, **like)
    return parts if video else (*parts, TOKENS)


def main() -> None:
    for name in ("lumina", "qwen_image"):
        importlib.import_module(f"comfy.ldm.{name}.model").optimized_attention_masked = fused
    cards = " | ".join(f"{card} GB" for card in CARDS)
    print(f"| family, base, size | weights | LoRA, AdamW | kept | {cards} | kept, checkpointing | {cards} |")
    print("|" + " --- |" * (5 + 2 * len(CARDS)))
    for family in LAYOUTS:
        for base, name in ((torch.bfloat16, "bfloat16"), (torch.float8_e4m3fn, "float8")):
            for size in (512, 1024):
                found = counted(family, base, size)
                cells = [f"{found[part] / GIB:.1f}" for part in ("weights", "LoRA")]
                for part in ("kept", "kept, checkpointing"):
                    need = found["weights"] + found["LoRA"] + memory.MARGIN * found[part] + memory.BASE
                    fits = ["yes" if need <= card * 1e9 else "no" for card in CARDS]
                    cells += [f"{found[part] / GIB:.1f}", *fits]
                print(f"| {family}, {name}, {size} px | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
