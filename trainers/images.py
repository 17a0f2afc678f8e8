"""Images: sizes, conversions between Pillow and tensors, and the one reader of image files and folders."""

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import Tensor

from .text import quoted, text_of

EXTENSIONS = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff"}
MAX_PIXELS = 100_000_000  # of a file; more is nearly always a mistake, and takes gigabytes to open


def resize(image: Tensor, height: int, width: int) -> Tensor:
    """Resize `[c, h, w]` to `[c, height, width]`, bicubic, anti-aliased, clamped to 0..1."""
    resized = F.interpolate(image[None], (height, width), mode="bicubic", align_corners=False, antialias=True)
    return resized[0].clamp(0, 1)


def bucket(height: int, width: int, resolution: int) -> tuple[int, int]:
    """Return the height and width, of about `resolution` squared, whose aspect ratio is closest to an image's.

    Both are multiples of a step, a sixteenth of the resolution, and lie between half and twice the resolution. Their
    area is at most that of the square; with a step more on either side it would be larger.
    """
    step = max(8, round(resolution / 16 / 8) * 8)
    shortest = -(-resolution // (2 * step)) * step
    sides = [(short, resolution**2 // short // step * step) for short in range(shortest, resolution + 1, step)]
    ratio = max(height, width) / min(height, width)
    short, long = min(sides, key=lambda pair: abs(math.log(pair[1] / pair[0] / ratio)))
    return (short, long) if height <= width else (long, short)


def cut(image: Tensor, height: int, width: int, position: float) -> Tensor:
    """Crop `[c, h, w]` to this aspect ratio, at `position` in 0..1 along the longer axis, and resize it."""
    scale = min(image.shape[-2] / height, image.shape[-1] / width)
    rows, columns = round(height * scale), round(width * scale)
    top, left = round((image.shape[-2] - rows) * position), round((image.shape[-1] - columns) * position)
    image = image[:, top : top + rows, left : left + columns]
    return image if image.shape[-2:] == (height, width) else resize(image, height, width)


def to_pil(pixels: Tensor) -> Image.Image:
    """Convert `[3, h, w]` in 0..1 to a Pillow image of 8 bits."""
    array = (pixels.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).cpu().numpy()
    return Image.fromarray(np.ascontiguousarray(array))


def pixels(image: Image.Image) -> Tensor:
    """Convert a Pillow image to `[c, h, w]` in 0..1.

    numpy divides, as in the host: torch may multiply, which rounds differently.
    """
    array = np.asarray(image).astype(np.float32) / 255
    return torch.from_numpy(array.reshape(*array.shape[:2], -1)).permute(2, 0, 1).contiguous()


def image_files(folder: Path) -> list[Path]:
    """Return a folder's image files by name."""
    return sorted(file for file in folder.glob("*") if file.suffix.lower() in EXTENSIONS and file.is_file())


def read_folder(
    folder: Path, allowed: Callable[[Path], Path] = lambda file: file
) -> tuple[tuple[Tensor, ...], tuple[str, ...]]:
    """Read the images of a folder by name, `[3, h, w]` in 0..1, and their captions; no captions if all are empty.

    A caption is the text of a .txt file of the image's name; images are rotated as their EXIF says.

    Args:
        allowed: returns the path of an image or a caption, or raises `ValueError` where it must not be read.

    Raises:
        ValueError: the folder holds no images, or a file in it cannot be read.
    """
    files = image_files(folder)
    if not files:
        raise ValueError(
            f"The folder {quoted(folder.name)} holds no images: put png, jpg, webp, bmp or tiff files into it."
        )
    captions = tuple(_caption(allowed(text)) if (text := file.with_suffix(".txt")).exists() else "" for file in files)
    return tuple(read_image(allowed(file)) for file in files), captions if any(captions) else ()


def read_image(file: Path) -> Tensor:
    """Read an image file as `[3, h, w]` in 0..1; transparent areas become white.

    Raises:
        ValueError: it cannot be read, has too many pixels, or values of an unknown range.
    """
    try:
        with Image.open(file) as image:
            # Checked before it is unpacked, which may take a thousand times the file's size.
            array = None if image.width * image.height > MAX_PIXELS else _rgb(ImageOps.exif_transpose(image))
    except Image.DecompressionBombError:
        array = None
    except UnknownRange:
        raise ValueError(
            f"The image {quoted(file.name)} has values of an unknown range: save it with 8 or 16 bits per channel."
        ) from None
    except Exception as error:  # Pillow's decoders raise whatever a damaged file leads them to
        raise ValueError(
            f"The image {quoted(file.name)} cannot be read: replace it, or take it out of the folder."
        ) from error
    if array is None:
        raise ValueError(
            f"The image {quoted(file.name)} has more than {MAX_PIXELS // 10**6} million pixels: make it smaller."
        )
    return torch.from_numpy(array).permute(2, 0, 1)


class UnknownRange(Exception):
    """Pixel values of which nobody knows what black and white are."""


def _rgb(image: Image.Image) -> np.ndarray:
    """Convert an image to `[h, w, 3]` in 0..1."""
    if image.mode == "I" or image.mode.startswith("I;16"):
        gray = np.asarray(image).astype(np.int64)  # Pillow would cut 16 bits off at 255
        if gray.min() < 0 or gray.max() > 65535:
            raise UnknownRange
        return np.repeat(gray[..., None] / np.float32(65535), 3, axis=2).astype(np.float32)
    if image.mode == "F":
        raise UnknownRange
    if "A" in image.getbands() or "transparency" in image.info:
        white = Image.new("RGBA", image.size, "white")
        white.alpha_composite(image.convert("RGBA"))
        image = white
    return np.asarray(image.convert("RGB")).astype(np.float32) / 255


def _caption(file: Path) -> str:
    text = text_of(file, f"The caption {quoted(file.name)}", "replace it, or take it out of the folder")
    return " ".join(text.split())
