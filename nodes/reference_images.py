"""Reference pictures from sockets and folders, checked before anything expensive starts."""

import os
import re
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from ..trainers.text import quoted, reason
from .host import folders

EXTENSIONS = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff"}
MOST_PIXELS = 100_000_000  # of a file; more is nearly always a mistake, and takes gigabytes to open


def connected(images: dict[str, list[Tensor]] | None) -> list[Tensor]:
    """Every picture of every connected IMAGE, `[3, h, w]`, in the order of the sockets."""
    batches = [batch for value in (images or {}).values() for batch in (value if isinstance(value, list) else [value])]
    # Copies: what comes down the graph was made in inference mode, and others may use it too.
    return [_rgb(picture).movedim(-1, 0).float().cpu().clone() for batch in batches for picture in batch]


def _rgb(picture: Tensor) -> Tensor:
    """`[h, w, c]` to three channels: gray three times, transparent over white, as a folder's files are read."""
    channels = picture.shape[-1]
    if channels not in (1, 3, 4):
        raise ValueError(f"A connected picture has {channels} channels: connect one in colour or in gray.")
    if channels < 4:
        return picture.expand(-1, -1, 3)
    return picture[..., :3] * picture[..., 3:] + 1 - picture[..., 3:]


def captions_for(text: str, count: int) -> list[str]:
    """The captions of `count` connected pictures, one per line; without any text an empty one each.

    Raises:
        ValueError: another number of lines.
    """
    lines = [line.strip() for line in text.split("\n")] if text.strip() else [""] * count
    while len(lines) > count and not lines[-1]:
        lines.pop()
    if len(lines) != count:
        raise ValueError(
            f"The captions have {len(lines)} lines but {count} pictures are connected: write one line per connected "
            "picture, an empty one for none, and a caption of a folder's picture into a .txt file beside it."
        )
    return lines


def images_in(folder: str) -> tuple[list[Tensor], list[str]]:
    """The pictures of a folder inside ComfyUI's input folder, by name, turned upright as their camera noted, and their
    captions: the text of a .txt file beside the picture, of the same name, else "".

    Raises:
        ValueError: the folder lies elsewhere, does not exist, holds no pictures, or a file in it cannot be read.
    """
    path = folders.inside_input(folder)
    if not os.path.isdir(path):
        raise ValueError(
            f"There is no folder {quoted(folder)} in ComfyUI's input folder: write its name as it is there."
        )
    files = sorted(f for f in Path(path).iterdir() if f.suffix.lower() in EXTENSIONS and f.is_file())
    if not files:
        raise ValueError(
            f"The folder {quoted(folder)} holds no pictures: put png, jpg, webp, bmp or tiff files into it."
        )
    return [_read(file) for file in files], [_caption_beside(folder, file) for file in files]


def of_class(images: list[Tensor] | None, folder: str) -> tuple[list[Tensor], list[str]]:
    """Connected class pictures and those of a folder, and what they show: "" where no file says it, none if all are.

    Raises:
        ValueError: as `pictures_in`.
    """
    pictures = connected({"class_images": images} if images else None)
    captions = [""] * len(pictures)
    if folder:
        more, beside = images_in(folder)
        pictures, captions = pictures + more, captions + beside
    return pictures, captions if any(captions) else []


def _read(file: Path) -> Tensor:
    try:
        with Image.open(file) as image:
            # Looked at before it is unpacked, which may take a thousand times the file's size.
            pixels = None if image.width * image.height > MOST_PIXELS else _pixels(ImageOps.exif_transpose(image))
    except Image.DecompressionBombError:
        pixels = None
    except UnknownColours:
        raise ValueError(
            f"The picture {quoted(file.name)} holds no common colours: save it with 8 or 16 bits per colour."
        ) from None
    except Exception as error:  # Pillow's decoders raise whatever a damaged file leads them to
        raise ValueError(
            f"The picture {quoted(file.name)} cannot be read: replace it, or take it out of the folder."
        ) from error
    if pixels is None:
        raise ValueError(
            f"The picture {quoted(file.name)} has more than {MOST_PIXELS // 10**6} million pixels: make it smaller."
        )
    return torch.from_numpy(pixels).permute(2, 0, 1)


class UnknownColours(Exception):
    """Numbers whose black and white are unknown."""


def _pixels(image: Image.Image) -> np.ndarray:
    """`[h, w, 3]` in 0..1; what is transparent shows white, as it does on a page."""
    if image.mode == "I" or image.mode.startswith("I;16"):
        gray = np.asarray(image).astype(np.int64)  # Pillow would cut 16 bits off at 255
        if gray.min() < 0 or gray.max() > 65535:
            raise UnknownColours
        return np.repeat(gray[..., None] / np.float32(65535), 3, axis=2).astype(np.float32)
    if image.mode == "F":
        raise UnknownColours
    if "A" in image.getbands() or "transparency" in image.info:
        white = Image.new("RGBA", image.size, "white")
        white.alpha_composite(image.convert("RGBA"))
        image = white
    return np.asarray(image.convert("RGB")).astype(np.float32) / 255


def _caption_beside(folder: str, picture: Path) -> str:
    beside = picture.with_suffix(".txt")
    if not beside.exists():
        return ""
    try:
        text = Path(folders.inside_input(os.path.join(folder, beside.name))).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"The caption {beside.name} cannot be read as text: save it as UTF-8.") from error
    except OSError as error:
        raise ValueError(
            f"The caption {beside.name} cannot be read ({reason(error)}): replace it, or take it out of the folder."
        ) from error
    return " ".join(text.split())


def chosen(
    pictures: list[Tensor], masks: list[Tensor], captions: list[str], first: int, choose: str
) -> tuple[list[Tensor], list[Tensor], list[str]]:
    """The pictures to learn from, with their masks as `[1, h, w]` and their captions, one for each or none at all.

    Raises:
        ValueError: no pictures, masks that do not fit them, or a choice that does not exist.
    """
    if not pictures:
        raise ValueError("There is no picture to learn from: connect an image, or name a folder in the input folder.")
    if masks and len(masks) != len(pictures):
        raise ValueError(f"There are {len(pictures)} pictures but {len(masks)} masks: connect one mask per picture.")
    index = _indices(choose, len(pictures)) if choose.strip() else range(len(pictures))[: first or None]
    masks = [_fitting(masks[i], pictures[i]) for i in index] if masks else []
    kept = [captions[i] for i in index]
    return [pictures[i] for i in index], masks, kept if any(kept) else []


def _indices(choose: str, count: int) -> list[int]:
    """'1, 3-5' to [0, 2, 3, 4]."""
    index = []
    for part in choose.split(","):
        match = re.fullmatch(r"\s*(\d{1,6})\s*(?:-\s*(\d{1,6})\s*)?", part)
        low, high = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if low > high:
            raise ValueError(f"Cannot read {quoted(choose)} as a choice of pictures: write numbers such as '1, 3-5'.")
        if low < 1 or high > count:
            raise ValueError(f"Picture {part.strip()} does not exist: choose from 1 to {count}.")
        index += range(low - 1, high)
    return index


def _fitting(mask: Tensor, picture: Tensor) -> Tensor:
    if not mask.any():  # first: what Load Image gives for a picture without transparency is empty and has its own size
        raise ValueError("A mask is empty: paint over the subject, or leave the mask unconnected.")
    if mask.shape[-2:] != picture.shape[-2:]:
        height, width = picture.shape[-2:]
        raise ValueError(
            f"A mask is {mask.shape[-1]} x {mask.shape[-2]} pixels but its picture {width} x {height}: "
            "use a mask of the same size."
        )
    return mask.float().cpu().clone().clamp(0, 1)[None]
