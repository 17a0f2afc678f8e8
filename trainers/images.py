"""Images: sizes, conversions between Pillow and tensors, and the one reader of image files and folders."""

import math
import re
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import Tensor

from .text import left_out, quoted, text_of

EXTENSIONS = {".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".avif", ".bmp", ".tif", ".tiff"}
MASK = "-masklabel"  # behind the name of an image, the name of its mask
MAX_PIXELS = 100_000_000  # of a file; more is nearly always a mistake, and takes gigabytes to open
MOST_PIXELS = 3 * MAX_PIXELS  # of all files that are read together: 3.6 GB
MOST_GENERATED = 2**30  # pixels of images that are generated together: 13 GB


def check_pixels(pixels: int, images: str = "The images", most: int = MOST_GENERATED) -> None:
    """Raise `ValueError` where `images`, as messages call them, have too many pixels: each takes 12 bytes of memory."""
    if pixels > most:
        raise ValueError(
            f"{images} have {pixels // 10**6} million pixels together, more than {most // 10**6}: make them smaller, "
            "or use fewer."
        )


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


@dataclass(frozen=True, kw_only=True)
class ImageFile:
    """An image file of a folder, with the files of its caption and its mask where there are any."""

    path: Path
    caption_file: Path | None = None
    mask_file: Path | None = None

    def caption(self) -> str:
        """Read the caption as one line; "" where there is none."""
        if self.caption_file is None:
            return ""
        name = f"The caption {quoted(self.caption_file.name)}"
        return " ".join(text_of(self.caption_file, name, "replace it, or take it out of the folder").split())

    def mask(self) -> Tensor | None:
        """Read the mask, `[1, h, w]` in 0..1, white where the subject is; `None` where there is none."""
        return None if self.mask_file is None else read_image(self.mask_file).mean(dim=0, keepdim=True)


def image_files(folder: Path) -> list[Path]:
    """Return a folder's images without their masks, `img2` before `img10`."""
    return [file for file in _with_masks(folder) if not _key(file.stem).endswith(MASK)]


def _with_masks(folder: Path) -> list[Path]:
    """Return a folder's images and masks; files whose names begin with a dot are other programs'."""
    found = (file for file in folder.iterdir() if file.suffix.lower() in EXTENSIONS and not file.name.startswith("."))
    return sorted(filter(Path.is_file, found), key=lambda file: _natural(file.name))


def find_images(folder: Path, allowed: Callable[[Path], Path] = lambda file: file) -> tuple[list[ImageFile], list[str]]:
    """Return the images of a folder, `img2` before `img10`, and the names of files that are none and belong to none.

    A caption is a text in `a.txt`, `a.caption` or `a.png.txt` beside `a.png`; its mask is `a-masklabel.png`, as in
    OneTrainer. Small and capital letters are alike, as are the two spellings of `é`, which systems exchange when files
    are copied. Folders with images, as kohya's scripts want them, are named but not read.

    Args:
        allowed: returns the path of a file, or raises `ValueError` where it must not be read.

    Raises:
        ValueError: the folder holds no images.
    """
    names = sorted((file.name for file in folder.iterdir() if file.is_file()), key=_natural)
    texts = {_key(name): folder / name for name in names} | {name: folder / name for name in names}
    masks = {stem.removesuffix(MASK): file for file in _with_masks(folder) if (stem := _key(file.stem)).endswith(MASK)}
    found = [
        ImageFile(
            path=allowed(file),
            caption_file=next((allowed(texts[name]) for name in _captions(Path(file.name)) if name in texts), None),
            mask_file=allowed(masks[_key(file.stem)]) if _key(file.stem) in masks else None,
        )
        for file in image_files(folder)
    ]
    inner = _folders(folder)
    if not found and inner:
        raise ValueError(
            f"The folder {quoted(folder.name)} holds no images, but its folder {quoted(inner[0])} does: name that one."
        )
    if not found:
        raise ValueError(
            f"The folder {quoted(folder.name)} holds no images: put png, jpg, webp, avif, bmp or tiff files into it."
        )
    used = {file.name for each in found for file in (each.path, each.caption_file, each.mask_file) if file}
    return found, [name for name in names if name not in used] + [f"{name}/" for name in inner]


def _folders(folder: Path) -> list[str]:
    """Return the names of folders in a folder that hold images."""
    inner = (each for each in folder.iterdir() if each.is_dir() and not each.is_symlink() and each.name[0] != ".")
    return sorted((each.name for each in inner if image_files(each)), key=_natural)


def _key(name: str) -> str:
    """Return what is equal of names that a system may have respelled."""
    return unicodedata.normalize("NFC", name).casefold()


def _natural(name: str) -> tuple[list, str]:
    """Return a key that sorts numbers in names by their value."""
    return [int(part) if part.isdecimal() else part.lower() for part in re.split(r"(\d+)", name)], name


def _captions(image: Path) -> list[str]:
    """Return the names that an image's caption may have, its own spelling first."""
    own = [f"{image.stem}.txt", f"{image.stem}.caption", f"{image.name}.txt"]
    return own + [_key(name) for name in own]


def read_images(files: Sequence[ImageFile]) -> tuple[tuple[Tensor, ...], tuple[str, ...], tuple[Tensor, ...] | None]:
    """Read images `[3, h, w]` in 0..1, their captions (none if all are empty) and masks (`None` if there is none).

    An image without a mask among others that have one is learned whole.

    Raises:
        ValueError: a file cannot be read, a mask has another size than its image, or they are too many.
    """
    check_sizes(path for file in files for path in (file.path, file.mask_file) if path)
    images, captions = tuple(read_image(file.path) for file in files), tuple(file.caption() for file in files)
    if all(file.mask_file is None for file in files):
        return images, captions if any(captions) else (), None
    masks = tuple(map(_mask, files, images))
    return images, captions if any(captions) else (), masks


def _mask(file: ImageFile, image: Tensor) -> Tensor:
    mask = file.mask()
    if mask is None or file.mask_file is None:
        return image.new_ones(1, *image.shape[-2:])
    name = f"The mask {quoted(file.mask_file.name)}"
    if mask.shape[-2:] != image.shape[-2:]:
        raise ValueError(f"{name} is {_size(mask)} pixels but its image {_size(image)}: use a mask of the same size.")
    if not mask.any():
        raise ValueError(f"{name} is empty: paint the subject white, or take it out of the folder.")
    return mask


def _size(image: Tensor) -> str:
    return f"{image.shape[-1]} x {image.shape[-2]}"


def check_sizes(files: Iterable[Path]) -> None:
    """Raise `ValueError` where images together have more than `MOST_PIXELS`, by their headers.

    Those whose header cannot be read are left to `read_image`.
    """
    pixels = 0
    for file in files:
        try:
            with Image.open(file) as image:
                pixels += image.width * image.height
        except Exception:  # Pillow's readers raise whatever a damaged file leads them to
            continue
    check_pixels(pixels, most=MOST_PIXELS)


def read_folder(
    folder: Path, say: Callable[[str], None] = lambda sentence: None
) -> tuple[tuple[Tensor, ...], tuple[str, ...], tuple[Tensor, ...] | None]:
    """Return what `read_images` does of a folder, and name the files that are left out.

    Raises:
        ValueError: there is no such folder, it holds no images, or a file in it cannot be read.
    """
    if not folder.is_dir():
        raise ValueError(f"The folder {quoted(str(folder))} does not exist: check its path.")
    files, names = find_images(folder)
    if names:
        say(left_out(names))
    return read_images(files)


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
