"""Writes the demo's complete checkpoint (one safetensors file in SD1.x layout) from the small files in weights/.

    python demo/build.py OUT.safetensors                  (a second; needs torch and safetensors only)
    python demo/build.py OUT.safetensors --transformer    (its transformer in Z-Image's layout instead of the U-Net)

weights/ leaves out what can be made again: the token rows of words that the world never uses (here: seeded random
rows as strong as the trained ones, the same at every build) and the autoencoder's zeros. U-Net and transformer lie
there as whole numbers of 8 bits with one scale per output channel, half the size of fp16. ComfyUI's own loader reads
the result once architecture.py has registered the tiny architectures.
"""

import argparse
import os
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

WEIGHTS = Path(__file__).resolve().parent / "weights"
TEXT, AUTOENCODER = "cond_stage_model.transformer.text_model.", "first_stage_model."
NETWORK = "model.diffusion_model."
VOCABULARY, SEED, WIDTH = 49408, 20, 64
SCALE = ".scale"
# What the file does not say about its layout: the U-Net in LDM's words, and the text encoder's attention heads.
UNET = {
    "in_channels": 4,
    "out_channels": 4,
    "model_channels": 64,
    "channel_mult": [1, 2],
    "num_res_blocks": [2, 2],
    "transformer_depth": [0, 0, 1, 1],
    "transformer_depth_middle": 1,
    "num_heads": 4,
    "context_dim": 128,
    "use_linear_in_transformer": False,
}
HEADS = 4


def packed(weights: dict) -> dict:
    """Tensors of two and more dimensions as int8 with one fp16 scale per row; the others as fp16."""
    small = {}
    for name, weight in weights.items():
        if weight.dim() < 2:
            small[name] = weight.half()
            continue
        scale = weight.float().flatten(1).abs().amax(1).clamp(min=1e-6) / 127
        scale = scale.half().float().view(-1, *[1] * (weight.dim() - 1))
        small[name] = (weight.float() / scale).round().clamp(-127, 127).to(torch.int8)
        small[name + SCALE] = scale.half()
    return small


def unpacked(stored: dict) -> dict:
    """The inverse of `packed`, in fp16."""
    scaled = {name for name in stored if name + SCALE in stored}
    return {
        name: (value.float() * stored[name + SCALE].float()).half() if name in scaled else value
        for name, value in stored.items()
        if not name.endswith(SCALE)
    }


def token_table(tokens: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """[49408, width] fp16: the trained rows at their token ids, seeded random rows of the same spread elsewhere."""
    generator = torch.Generator().manual_seed(SEED)
    table = torch.randn(VOCABULARY, rows.shape[1], generator=generator) * rows.float().std()
    table[tokens.long()] = rows.float()
    return table.half()


def _block_zeros(prefix: str) -> dict:
    """A residual block that changes nothing: three zero convolutions."""
    shapes = {"weight": (WIDTH, WIDTH, 3, 3), "bias": (WIDTH,)}
    return {f"{prefix}conv.{i}.{k}": torch.zeros(shape).half() for i in (0, 2, 4) for k, shape in shapes.items()}


def autoencoder(stored: dict) -> dict:
    """The stored convolutions and every zero that TAESD's shape asks for."""
    weights = {AUTOENCODER + "taesd_encoder.0.bias": torch.zeros(WIDTH).half()}
    blocks = {
        "taesd_encoder.": (1, 3, 4, 5, 7, 8, 9, 11, 12, 13),
        "taesd_decoder.": (3, 4, 5, 8, 9, 10, 13, 14, 15, 18),
    }
    for part, numbers in blocks.items():
        for number in numbers:
            weights |= _block_zeros(f"{AUTOENCODER}{part}{number}.")
    return weights | stored


def checkpoint(folder: Path = WEIGHTS, transformer: bool = False) -> dict:
    """All tensors of the complete checkpoint by name: of the U-Net's, or of the transformer's."""
    text = load_file(folder / "text.safetensors")
    table = token_table(text.pop("tokens"), text.pop("token_rows"))
    text[TEXT + "embeddings.token_embedding.weight"] = table
    shared = text | autoencoder(load_file(folder / "vae.safetensors"))
    if not transformer:
        return unpacked(load_file(folder / "unet.safetensors")) | shared
    parts = {TEXT: "text_encoders.clip_l.transformer.text_model.", AUTOENCODER: "vae."}  # as in files of Z-Image
    renamed = {
        new + name.removeprefix(old): value
        for old, new in parts.items()
        for name, value in shared.items()
        if name.startswith(old)
    }
    network = unpacked(load_file(folder / "transformer.safetensors"))
    return {NETWORK + name: value for name, value in network.items()} | renamed


def build_checkpoint(out_path, folder: Path = WEIGHTS, transformer: bool = False) -> Path:
    """Writes the checkpoint to out_path (never half a file there) and returns the path."""
    out_path = Path(out_path)
    out_path.parent.mkdir(parents=True, exist_ok=True)
    part = out_path.with_name(out_path.name + ".part")
    save_file(checkpoint(folder, transformer), part, metadata={"format": "pt"})
    os.replace(part, out_path)
    return out_path


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out")
    parser.add_argument("--weights", type=Path, default=WEIGHTS)
    parser.add_argument("--transformer", action="store_true", help="the transformer instead of the U-Net")
    options = parser.parse_args()
    print(build_checkpoint(options.out, options.weights, options.transformer))
