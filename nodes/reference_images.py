"""Reads reference images from sockets and folders, and checks them before anything expensive starts."""

import os
import re
from pathlib import Path

from torch import Tensor

from ..trainers.images import ImageFile, find_images, read_images
from ..trainers.text import quoted
from .host import folders


def connected(images: dict[str, list[Tensor]] | None) -> list[Tensor]:
    """Return every image of every connected IMAGE, `[3, h, w]`, in the order of the sockets."""
    batches = [batch for value in (images or {}).values() for batch in (value if isinstance(value, list) else [value])]
    # Copies: what comes down the graph was made in inference mode, and others may use it too.
    return [_rgb(image).movedim(-1, 0).float().cpu().clone() for batch in batches for image in batch]


def _rgb(image: Tensor) -> Tensor:
    """Convert `[h, w, c]` to three channels: gray is repeated, transparency becomes white, as for files of a folder."""
    channels = image.shape[-1]
    if channels not in (1, 3, 4):
        raise ValueError(f"A connected image has {channels} channels: connect an RGB, RGBA or grayscale image.")
    if channels < 4:
        return image.expand(-1, -1, 3)
    return image[..., :3] * image[..., 3:] + 1 - image[..., 3:]


def captions_for(text: str, count: int) -> list[str]:
    """Return the captions of `count` connected images, one per line of `text`; empty captions for an empty text.

    Raises:
        ValueError: the number of lines is not `count`.
    """
    lines = [line.strip() for line in text.split("\n")] if text.strip() else [""] * count
    while len(lines) > count and not lines[-1]:
        lines.pop()
    if len(lines) != count:
        raise ValueError(
            f"The captions have {len(lines)} lines but {count} images are connected: write one line per connected "
            "image, an empty line for no caption, and captions of a folder's images into .txt files of the same name."
        )
    return lines


def files_in(folder: str) -> tuple[list[ImageFile], list[str]]:
    """Return the image files of a folder inside ComfyUI's input folder, and the names of files that are left out.

    Raises:
        ValueError: the folder lies elsewhere, does not exist, or holds no images, or a link leads out of it.
    """
    path = Path(folders.inside_input(folder))
    if not os.path.isdir(path):  # unlike Path.is_dir, False for a name that is too long
        raise ValueError(
            f"The folder {quoted(folder)} does not exist in ComfyUI's input folder: write its name as it is there."
        )
    return find_images(path, lambda file: Path(folders.inside_input(os.path.join(folder, file.name))))


def of_class(images: list[Tensor] | None, files: list[ImageFile]) -> tuple[list[Tensor], list[str]]:
    """Return the connected class images and those of files, and their captions, "" for none; no list if all are "".

    Raises:
        ValueError: as `read_images`.
    """
    class_images = connected({"class_images": images} if images else None)
    more, captions, _ = read_images(files)
    texts = [""] * len(class_images) + [*(captions or [""] * len(more))]
    return [*class_images, *more], texts if any(texts) else []


def chosen(
    images: list[Tensor],
    captions: list[str],
    files: list[ImageFile],
    masks: list[Tensor],
    max_images: int,
    selection: str,
    inverted: bool = False,
) -> tuple[list[Tensor], list[Tensor], list[str]]:
    """Return the reference images, their masks as `[1, h, w]` and their captions, one for each or none at all.

    Only the files that are chosen are read.

    Args:
        images: connected ones, with their captions; `files` follow them.
        masks: of all of them, or none: then files have their own. They are white where the subject is.
        max_images: number of images to use, 0 for all.
        selection: numbers of the images to use, such as "1, 3-5"; "" for all.
        inverted: `masks` are white where the subject is not, as Load Image's of a cut-out: there images become white.

    Raises:
        ValueError: there is no image, the masks do not fit, or a selected image does not exist.
    """  # fmt: skip
    count = len(images) + len(files)
    if not count:
        raise ValueError("There is no reference image: connect an image, or name a folder in the input folder.")
    if masks and len(masks) != count:
        raise ValueError(f"There are {count} images but {len(masks)} masks: connect one mask per image.")
    index = _indices(selection, count) if selection.strip() else range(count)[: max_images or None]
    read = read_images([files[i - len(images)] for i in index if i >= len(images)])
    more, texts, own = (iter(each) for each in (read[0], read[1] or [""] * len(read[0]), read[2] or ()))
    found = [(images[i], captions[i]) if i < len(images) else (next(more), next(texts)) for i in index]
    if masks and inverted:
        pairs = [_cut_out(masks[i], image) for i, (image, _) in zip(index, found, strict=True)]
        found = [(image, text) for (image, _), (_, text) in zip(pairs, found, strict=True)]
        fitting = [mask for _, mask in pairs]
    elif masks:
        fitting = [_fitting(masks[i], image) for i, (image, _) in zip(index, found, strict=True)]
    elif read[2]:
        whole = [image.new_ones(1, *image.shape[-2:]) for image, _ in found]
        fitting = [mask if i < len(images) else next(own) for i, mask in zip(index, whole, strict=True)]
    else:
        fitting = []
    texts = [text for _, text in found]
    return [image for image, _ in found], fitting, texts if any(texts) else []


def _indices(selection: str, count: int) -> list[int]:
    """Convert '1, 3-5' to [0, 2, 3, 4]."""
    index = []
    for part in selection.split(","):
        match = re.fullmatch(r"\s*(\d{1,6})\s*(?:-\s*(\d{1,6})\s*)?", part)
        low, high = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if low > high:
            raise ValueError(
                f"The selection {quoted(selection)} cannot be read: write numbers of images such as '1, 3-5'."
            )
        if low < 1 or high > count:
            raise ValueError(f"Image {part.strip()} does not exist: select from 1 to {count}.")
        index += range(low - 1, high)
    return index


def _fitting(mask: Tensor, image: Tensor) -> Tensor:
    if not mask.any():  # first: Load Image's mask of an image without transparency is empty and has another size
        raise ValueError("A mask is empty: paint over the subject, or leave the mask unconnected.")
    if mask.shape[-2:] != image.shape[-2:]:
        height, width = image.shape[-2:]
        raise ValueError(
            f"A mask is {mask.shape[-1]} x {mask.shape[-2]} pixels but its image {width} x {height}: "
            "use a mask of the same size."
        )
    return mask.float().cpu().clone().clamp(0, 1)[None]


def _cut_out(mask: Tensor, image: Tensor) -> tuple[Tensor, Tensor]:
    """Return an image over white and where its subject is; `mask` is white where it is transparent.

    Load Image's mask of an image without transparency is empty and has another size: such an image is learned whole.
    """
    if not mask.any():
        return image, image.new_ones(1, *image.shape[-2:])
    own = _fitting(1 - mask, image)
    return image * own + (1 - own), own


def masked(image: Tensor, mask: Tensor) -> Tensor:
    """Return an image `[1, h, w, 3]` with red over what its mask `[1, h, w]` leaves out, to look at."""
    kept = 0.3 + 0.7 * mask[..., None]
    return image * kept + (1 - kept) * image.new_tensor([1.0, 0.0, 0.0])
