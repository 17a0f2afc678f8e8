"""Reference pictures from sockets and folders, checked before anything expensive starts."""

import os
import re
from pathlib import Path

from torch import Tensor

from ..trainers.images import read_folder
from ..trainers.text import quoted
from .host import folders


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
    """The images of a folder inside ComfyUI's input folder and a caption for each, "" where there is none.

    Raises:
        ValueError: the folder lies elsewhere, does not exist, holds no images, or a file in it cannot be read.
    """
    path = Path(folders.inside_input(folder))
    if not path.is_dir():
        raise ValueError(
            f"There is no folder {quoted(folder)} in ComfyUI's input folder: write its name as it is there."
        )
    images, captions = read_folder(path, lambda file: Path(folders.inside_input(os.path.join(folder, file.name))))
    return [*images], [*captions] or [""] * len(images)


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
