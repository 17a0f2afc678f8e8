"""Turns the training form of the model into the files of weights/: U-Net (8 bits) and text encoder (fp16), SD1.x names.

    python -m demo.export .dev/train/model.safetensors TOKENIZER demo/weights      (seconds)

The transformer has the names of its files already; it is only packed into 8 bits.
"""

import argparse
import re
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from .build import packed, unpacked
from .sample import untrained_unet
from .text import STRANGERS, Vocabulary, text_encoder

UNET, TEXT = "model.diffusion_model.", "cond_stage_model.transformer.text_model."
ROWS = "embeddings.token_embedding.weight"
LAYERS = 2
FIXED = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
    "down_blocks.0.downsamplers.0.conv": f"input_blocks.{LAYERS + 1}.0.op",
    "up_blocks.0.upsamplers.0.conv": f"output_blocks.{LAYERS}.2.conv",
    "mid_block.resnets.0": "middle_block.0",
    "mid_block.attentions.0": "middle_block.1",
    "mid_block.resnets.1": "middle_block.2",
}
RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}


def _block(name: str) -> str:
    """Place of a diffusers block in SD1.x numbering; the rest of the name follows unchanged."""
    for start, place in FIXED.items():
        if name.startswith(start + "."):
            return place + name[len(start) :]
    side, level, kind, index, rest = re.match(
        r"(down|up)_blocks\.(\d+)\.(resnets|attentions)\.(\d+)\.(.*)", name
    ).groups()
    number = int(level) * (LAYERS + 1) + int(index) + (side == "down")
    return f"{'input' if side == 'down' else 'output'}_blocks.{number}.{int(kind == 'attentions')}.{rest}"


def unet_name(name: str) -> str:
    """SD1.x name of a diffusers U-Net tensor (two levels, attention on the inner one)."""
    place = _block(name)
    if "resnets" not in name:
        return UNET + place
    head, part, kind = place.rsplit(".", 2)
    return f"{UNET}{head}.{RESNET[part]}.{kind}"


def export_unet(weights: dict) -> dict:
    return packed({unet_name(k[5:]): v.contiguous() for k, v in weights.items() if k.startswith("unet.")})


def export_text(weights: dict, words: Vocabulary) -> dict:
    """All text tensors; of the token table only the rows of the world's words, with their token ids."""
    text = {
        k[5:].removeprefix("text_model."): v.half().contiguous() for k, v in weights.items() if k.startswith("text.")
    }
    rows = text.pop(ROWS)[:-STRANGERS]
    text = {TEXT + k: v for k, v in text.items() if not k.endswith("position_ids")}
    return text | {"token_rows": rows.contiguous(), "tokens": torch.tensor(words.tokens, dtype=torch.int32)}


def load_exported(folder: Path, words: Vocabulary) -> tuple:
    """The way back: (U-Net, text encoder) in training form from the files of weights/, for sampling without a host."""
    stored, unet, text = unpacked(load_file(folder / "unet.safetensors")), untrained_unet(), text_encoder(words.size)
    unet.load_state_dict({name: stored[unet_name(name)].float() for name in unet.state_dict()})
    stored = load_file(folder / "text.safetensors")
    rows = torch.cat([stored["token_rows"].float(), torch.zeros(STRANGERS, stored["token_rows"].shape[1])])
    weights = {name.removeprefix(TEXT): value.float() for name, value in stored.items() if name.startswith(TEXT)}
    nested = "text_model." if any(name.startswith("text_model.") for name in text.state_dict()) else ""
    text.load_state_dict({nested + k: v for k, v in (weights | {ROWS: rows}).items()}, strict=False)
    return unet.eval(), text.eval()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="what train_unet.py wrote, or train_transformer.py")
    parser.add_argument("tokenizer")
    parser.add_argument("folder", type=Path)
    options = parser.parse_args()
    weights = load_file(options.model)
    options.folder.mkdir(parents=True, exist_ok=True)
    if "x_embedder.weight" in weights:
        save_file(packed(weights), options.folder / "transformer.safetensors")
        raise SystemExit
    save_file(export_unet(weights), options.folder / "unet.safetensors")
    save_file(export_text(weights, Vocabulary(options.tokenizer)), options.folder / "text.safetensors")
