"""Cross-attention as images: heat maps of its mean probabilities over a word's tokens, on top of an image.

Tensors in, tensors out; nodes/show_attention.py runs the U-Net and finds the tokens.
"""

from dataclasses import dataclass
from functools import reduce
from operator import add

import matplotlib
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import Tensor

from .figure import INK, font

COLOURS = "inferno"
HEAT = 0.65  # share of the heat map in a tile; the rest is the image
TILE = 512  # the longer side of a tile at most; attention itself is far coarser
GAP = 4
EVERYWHERE = "all"


def word_maps(weights: Tensor, words: list[list[int]], height: int, width: int) -> Tensor:
    """Return `[words, height, width]`: the mean over heads and over each word's tokens.

    Args:
        weights: one prompt's probabilities at one layer, `[heads, height * width, tokens]`.
        words: the positions of each word's tokens.
    """
    mean = weights.mean(dim=0)
    return torch.stack([mean[:, tokens].mean(dim=1) for tokens in words]).unflatten(1, (height, width))


def by_resolution(layers: list[Tensor], height: int) -> dict[str, Tensor]:
    """Return the mean of the layers at each resolution, finest first, named by its part of `height`: "1/2"."""
    groups: dict[str, list[Tensor]] = {}
    for layer in sorted(layers, key=lambda layer: -layer.shape[-1]):
        groups.setdefault(f"1/{_part(height, layer.shape[-2])}", []).append(layer)
    return {name: torch.stack(group).mean(dim=0) for name, group in groups.items()}


def _part(height: int, smaller: int) -> int:
    """Return by how much the U-Net reduced the height: it rounds up at each halving, so 1/8 of 9 are 2."""
    part = 1
    while height > smaller:
        height, part = -(-height // 2), 2 * part
    return part


def enlarged(maps: Tensor, height: int, width: int) -> Tensor:
    """Resize `[words, h, w]` to `[words, height, width]`."""
    return F.interpolate(maps[None], size=(height, width), mode="bilinear")[0]


def everywhere(layers: list[Tensor], height: int, width: int) -> Tensor:
    """Return the mean over all layers at the image's size, `[words, height, width]`."""
    return reduce(add, (enlarged(layer, height, width) for layer in layers)) / len(layers)


def normalised(maps: Tensor) -> Tensor:
    """Scale each map to 0 at its lowest and 1 at its highest value."""
    low, high = maps.amin(dim=(-2, -1), keepdim=True), maps.amax(dim=(-2, -1), keepdim=True)
    return (maps - low) / (high - low).clamp_min(torch.finfo(maps.dtype).tiny)


def heat(image: Tensor, values: Tensor, low: float, high: float) -> Tensor:
    """Draw `values` `[h, w]` in colours from `low` to `high` on an image `[h, w, 3]` in gray."""
    scaled = ((values - low) / max(high - low, 1e-12)).clamp(0, 1)
    colours = torch.from_numpy(matplotlib.colormaps[COLOURS](scaled.numpy())[..., :3]).to(image)
    return (1 - HEAT) * image.mean(dim=-1, keepdim=True) + HEAT * colours


@dataclass(frozen=True)
class Attention:
    """Attention maps of one model's words."""

    heading: str  # of its columns; "" for none
    layers: list[Tensor]  # [words, h, w] each, on the CPU
    height: int  # of the latents

    def columns(self, height: int, width: int) -> dict[str, Tensor]:
        """Return the maps of every resolution and of all layers, at the image's size."""
        groups = {name: enlarged(maps, height, width) for name, maps in by_resolution(self.layers, self.height).items()}
        return {**groups, EVERYWHERE: everywhere(self.layers, height, width)}


def sheet(image: Tensor, words: list[str], sides: list[Attention]) -> Tensor:
    """Draw `[H, W, 3]`: a row per word; in it the image, then each model's columns.

    The colours of a word's column have the same range for every model; the numbers above it are its ends.

    Args:
        image: `[h, w, 3]` in 0..1.
    """
    tile = _tile(image)
    columns = [side.columns(*tile.shape[:2]) for side in sides]
    rows = [_row(tile, word, [side.heading for side in sides], columns, i) for i, word in enumerate(words)]
    return _joined(rows, dim=0)


def _row(tile: Tensor, word: str, headings: list[str], columns: list[dict[str, Tensor]], i: int) -> Tensor:
    row = [_labelled(tile, word, "")]
    for heading, maps in zip(headings, columns, strict=True):
        for name in maps:
            models = torch.stack([others[name][i] for others in columns if name in others])
            low, high = models.min().item(), models.max().item()
            heated = heat(tile, maps[name][i], low, high)
            row.append(_labelled(heated, f"{heading} {name}".strip(), f"{low:.2g} - {high:.2g}"))
    return _joined(row, dim=1)


def _tile(image: Tensor) -> Tensor:
    height, width = image.shape[:2]
    smaller = min(1.0, TILE / max(height, width))
    size = (max(1, round(height * smaller)), max(1, round(width * smaller)))
    return F.interpolate(image.movedim(-1, 0)[None], size=size, mode="bilinear", antialias=True)[0].movedim(0, -1)


def _labelled(tile: Tensor, *lines: str) -> Tensor:
    """Draw lines of text above a tile."""
    size = min(20, max(10, tile.shape[1] // 16))
    strip = Image.new("RGB", (tile.shape[1], len(lines) * (size + 4)), "white")
    for i, line in enumerate(lines):
        ImageDraw.Draw(strip).text((2, i * (size + 4)), line, fill=INK, font=font(size))
    return torch.cat([torch.from_numpy(np.asarray(strip) / np.float32(255)), tile])


def _joined(parts: list[Tensor], dim: int) -> Tensor:
    """Join parts of one size, with a white gap between them."""
    gap = torch.ones_like(parts[0].narrow(dim, 0, GAP))
    return torch.cat([piece for part in parts for piece in (gap, part)][1:], dim=dim)
