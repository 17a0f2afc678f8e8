"""Reference pictures from sockets and folders, checked before anything expensive starts."""

import os
import re
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from . import host

EXTENSIONS = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff"}


def connected(images: dict[str, list[Tensor]] | None) -> list[Tensor]:
    """Every picture of every connected IMAGE, `[3, h, w]`, in the order of the sockets."""
    batches = [batch for value in (images or {}).values() for batch in (value if isinstance(value, list) else [value])]
    # Copies: what comes down the graph was made in inference mode, and others may use it too.
    return [picture[..., :3].movedim(-1, 0).float().cpu().clone() for batch in batches for picture in batch]


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


def pictures_in(folder: str) -> tuple[list[Tensor], list[str]]:
    """The pictures of a folder inside ComfyUI's input folder, by name, turned upright as their camera noted, and their
    captions: the text of a .txt file beside the picture, of the same name, else "".

    Raises:
        ValueError: the folder lies elsewhere, does not exist, holds no pictures, or a file in it cannot be read.
    """
    path = host.inside_input(folder)
    if not os.path.isdir(path):
        raise ValueError(f"There is no folder {folder!r} in ComfyUI's input folder.")
    files = sorted(f for f in Path(path).iterdir() if f.suffix.lower() in EXTENSIONS)
    if not files:
        raise ValueError(f"The folder {folder!r} holds no pictures (png, jpg, webp, bmp or tiff).")
    return [_read(file) for file in files], [_caption_beside(folder, file) for file in files]


def _read(file: Path) -> Tensor:
    try:
        with Image.open(file) as image:
            pixels = np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"{file.name} cannot be read as a picture: {error}") from error
    return torch.from_numpy(pixels.copy()).permute(2, 0, 1).float() / 255


def _caption_beside(folder: str, picture: Path) -> str:
    beside = picture.with_suffix(".txt")
    if not beside.exists():
        return ""
    try:
        text = Path(host.inside_input(os.path.join(folder, beside.name))).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"The caption {beside.name} cannot be read as text: {error}") from error
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
        if not match:
            raise ValueError(f"Cannot read {choose!r} as a choice of pictures: write numbers such as '1, 3-5'.")
        low, high = int(match[1]), int(match[2] or match[1])
        if not 1 <= low <= high <= count:
            raise ValueError(f"Picture {part.strip()} does not exist: there are {count}, counted from 1.")
        index += range(low - 1, high)
    return index


def _fitting(mask: Tensor, picture: Tensor) -> Tensor:
    if mask.shape[-2:] != picture.shape[-2:]:
        height, width = picture.shape[-2:]
        raise ValueError(
            f"A mask is {mask.shape[-1]} x {mask.shape[-2]} pixels but its picture {width} x {height}: "
            "use a mask of the same size."
        )
    mask = mask.float().cpu().clone().clamp(0, 1)[None]
    if not mask.any():
        raise ValueError("A mask is empty: paint over the subject, or leave the mask unconnected.")
    return mask
