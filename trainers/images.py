"""Sizes of pictures, and pictures of a size."""

import math

import numpy as np
import torch.nn.functional as F
from PIL import Image
from torch import Tensor


def resize(picture: Tensor, height: int, width: int) -> Tensor:
    """`[c, h, w]` to `[c, height, width]`, anti-aliased, clamped to 0..1."""
    resized = F.interpolate(picture[None], (height, width), mode="bicubic", align_corners=False, antialias=True)
    return resized[0].clamp(0, 1)


def bucket(height: int, width: int, resolution: int) -> tuple[int, int]:
    """The height and width, of about `resolution` squared, whose aspect ratio is closest to that of a picture.

    Both are multiples of a step, a sixteenth of the resolution, and lie between half and twice the resolution. Their
    area is at most that of the square; with a step more on either side it would be larger.
    """
    step = max(8, round(resolution / 16 / 8) * 8)
    shortest = -(-resolution // (2 * step)) * step
    sides = [(short, resolution**2 // short // step * step) for short in range(shortest, resolution + 1, step)]
    ratio = max(height, width) / min(height, width)
    short, long = min(sides, key=lambda pair: abs(math.log(pair[1] / pair[0] / ratio)))
    return (short, long) if height <= width else (long, short)


def cut(picture: Tensor, height: int, width: int, position: float) -> Tensor:
    """The largest part of `[c, h, w]` with this aspect ratio, at `position` in 0..1 along the longer axis, resized."""
    scale = min(picture.shape[-2] / height, picture.shape[-1] / width)
    rows, columns = round(height * scale), round(width * scale)
    top, left = round((picture.shape[-2] - rows) * position), round((picture.shape[-1] - columns) * position)
    picture = picture[:, top : top + rows, left : left + columns]
    return picture if picture.shape[-2:] == (height, width) else resize(picture, height, width)


def to_pil(pixels: Tensor) -> Image.Image:
    """`[3, h, w]` in 0..1 to a picture."""
    array = (pixels.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).cpu().numpy()
    return Image.fromarray(np.ascontiguousarray(array))
