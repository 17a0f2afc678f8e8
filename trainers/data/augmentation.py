"""Paired augmentation: an image and its prompt change together (TextBoost, arXiv 2409.08248).

An image that is shown larger, flipped or in a collage is also described so; the placeholder token then need not
explain the change. Masks follow every geometric operation. All random numbers are drawn from the generator passed in.
"""

import io
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Generator, Tensor

from ..digest import choose, draw
from ..images import pixels as from_pil
from ..images import resize, to_pil
from .concept import Concept, Cuts
from .latents import View

ImageAndMask = tuple[Tensor, Tensor | None]  # [3, h, w] in 0..1, and its mask [1, h, w]
# An image above its mask, [c, h, w], to one of the same shape and the operation's name; None where nothing is to see.
Operation = Callable[[Tensor, Generator], tuple[Tensor, str | None]]
Phrases = Mapping[str, str | tuple[str, ...]]


def augment(
    image: ImageAndMask,
    generator: Generator,
    *,
    operations: Sequence[Operation],
    collages: Sequence[int],
    p: float,
    grayscale_p: float,
    colours: Sequence[Operation] = (),
) -> View:
    """Return one view of an image, of the same shape: three independent draws that stack.

    With probability `p` one of `operations`; with probability `p` a collage of as many tiles on a side as one of
    `collages`, if there are any; with probability `grayscale_p` no colour, or one of `colours` instead.
    """
    pixels, mask = image
    stacked, names = (pixels if mask is None else torch.cat([pixels, mask])), []
    if draw(generator) < p:
        stacked, name = choose(operations, generator)(stacked, generator)
        names += [name] if name else []
    if collages and draw(generator) < p:
        stacked = collage(stacked, choose(collages, generator))
        names.append("collage")
    if draw(generator) < grayscale_p:
        colour = choose((without_colour, *colours), generator) if colours else without_colour
        pixels, name = colour(stacked[:3], generator)
        stacked = torch.cat([pixels, stacked[3:]])
        names += [name] if name else []
    return View(pixels=stacked[:3], mask=None if mask is None else stacked[3:], operations=tuple(names))


def scale(
    image: Tensor, generator: Generator, factors: tuple[float, float], named_outside: tuple[float, float]
) -> tuple[Tensor, str | None]:
    """Zoom about the centre, replicating the edge where it shrinks.

    Args:
        factors: the zoom is uniform between these two.
        named_outside: below the first it is named "zoom-out", above the second "zoom-in", between them not at all.
    """
    factor = draw(generator, *factors)
    name = "zoom-out" if factor < named_outside[0] else "zoom-in" if factor > named_outside[1] else None
    return zoom(image, factor), name


def zoom(image: Tensor, factor: float) -> Tensor:
    """Scale `[c, h, w]` by `factor` about the centre, to the same shape; replicate the edge where it shrinks."""
    height, width = image.shape[-2:]
    scaled = resize(image, *(max(1, round(side * factor)) for side in (height, width)))
    rows, columns = height - scaled.shape[-2], width - scaled.shape[-1]  # missing, or too many where negative
    top, left = rows // 2, columns // 2
    if factor > 1:
        return scaled[:, -top : height - top, -left : width - left]
    return F.pad(scaled[None], (left, columns - left, top, rows - top), mode="replicate")[0]


def crop(image: Tensor, generator: Generator, areas: tuple[float, float]) -> tuple[Tensor, str]:
    """Crop to a random part of the same aspect ratio, enlarged to the full size.

    Args:
        areas: its share of the image's area is uniform between these two.
    """
    full = image.shape[-2:]
    share = math.sqrt(draw(generator, *areas))
    height, width = (max(1, round(side * share)) for side in full)
    top, left = round(draw(generator) * (full[0] - height)), round(draw(generator) * (full[1] - width))
    return resize(image[:, top : top + height, left : left + width], *full), "crop"


def shift(image: Tensor, generator: Generator, shares: tuple[float, float]) -> tuple[Tensor, str]:
    """Move left or right, replicating the edge.

    Args:
        shares: the distance, as a share of the width, is uniform between these two.
    """
    pixels = round(draw(generator, *shares) * image.shape[-1])
    name = choose(("left", "right"), generator)
    padding = (0, pixels) if name == "left" else (pixels, 0)
    padded = F.pad(image[None], (*padding, 0, 0), mode="replicate")[0]
    return (padded[..., pixels:] if name == "left" else padded[..., : image.shape[-1]]), name


def flip(image: Tensor, generator: Generator) -> tuple[Tensor, str]:
    """Flip horizontally."""
    return image.flip(-1), "hflip"


def vertical_flip(image: Tensor, generator: Generator) -> tuple[Tensor, str]:
    """Flip vertically."""
    return image.flip(-2), "vflip"


def quarter_turn(image: Tensor, generator: Generator) -> tuple[Tensor, str]:
    """Rotate by 90 degrees, either way; an image that is not square is shrunk so that all of it is seen."""
    name = choose(("rot90", "rot270"), generator)
    return rotate(image, 90.0 if name == "rot90" else -90.0), name


def without_colour(pixels: Tensor, generator: Generator) -> tuple[Tensor, str]:
    """Convert `[3, h, w]` to grayscale."""
    return grayscale(pixels), "grayscale"


def brightness(pixels: Tensor, generator: Generator) -> tuple[Tensor, str]:
    """Multiply by 0.4 to 0.6, or by 1.3 to 1.5, equally likely."""
    name = choose(("dimmed", "bright"), generator)
    factor = draw(generator, 0.4, 0.6) if name == "dimmed" else draw(generator, 1.3, 1.5)
    return (pixels * factor).clamp(0, 1), name


def jpeg(pixels: Tensor, generator: Generator) -> tuple[Tensor, str]:
    """Compress `[3, h, w]` as JPEG of a quality from 25 to 74 and decompress it."""
    file = io.BytesIO()
    to_pil(pixels).save(file, format="JPEG", quality=25 + _place(49, generator))
    with Image.open(file) as image:
        return from_pil(image.convert("RGB")).to(pixels), "jpeg"


def collage(image: Tensor, tiles: int) -> Tensor:
    """Tile `tiles` x `tiles` small copies, each with a black edge of one pixel, which a mask counts as background."""
    rows, columns = ([round(i * side / tiles) for i in range(tiles + 1)] for side in image.shape[-2:])
    result = torch.zeros_like(image)
    for top, bottom in zip(rows, rows[1:], strict=False):
        for left, right in zip(columns, columns[1:], strict=False):
            small = resize(image, bottom - top - 2, right - left - 2)
            result[:, top + 1 : bottom - 1, left + 1 : right - 1] = small
    return result


def grayscale(pixels: Tensor) -> Tensor:
    """Return `[3, h, w]` with ITU-R 601 luma, `0.299 R + 0.587 G + 0.114 B`, in all three channels."""
    luma = (pixels * pixels.new_tensor([0.299, 0.587, 0.114])[:, None, None]).sum(dim=0, keepdim=True)
    return luma.expand(3, -1, -1)


BEFORE = 8  # tokens that `describe` writes before a prompt at most
EITHER_SIDE = ("crop", "hflip", "vflip", "dimmed", "bright", "jpeg")  # whose phrases stand before a prompt or after it


def describe(prompt: str, operations: tuple[str, ...], phrases: Phrases, generator: Generator) -> str:
    """Return the prompt with a phrase for every operation that has one.

    Zoom, collage and rotation stand before the prompt, left and right after it, grayscale after a comma, the others
    before it or after a comma, equally likely.

    Args:
        phrases: by operation; of a tuple of phrases one is drawn.
    """
    for name in operations:
        if name not in phrases:
            continue
        phrase = phrases[name] if isinstance(phrases[name], str) else choose(phrases[name], generator)
        if name in ("left", "right"):
            prompt = f"{prompt} {phrase}"
        elif name == "grayscale" or (name in EITHER_SIDE and draw(generator) < 0.5):
            prompt = f"{prompt}, {phrase}"
        else:
            prompt = f"{phrase} {prompt}"
    return prompt


def random_rotation(
    image: ImageAndMask, generator: Generator, p: float = 0.75, degrees: float = 45.0, flip_p: float = 0.25
) -> View:
    """Return one view for a method with a single prompt (AttnDreamBooth); it names no operation.

    With probability `p` it is rotated about the centre by up to `degrees` either way, shrunk so that all of it is seen,
    and reflected around it; with probability `flip_p` it is flipped horizontally.
    """
    pixels, mask = image
    stacked = pixels if mask is None else torch.cat([pixels, mask])
    if draw(generator) < p:
        stacked = rotate(stacked, draw(generator, -degrees, degrees))
    if draw(generator) < flip_p:
        stacked = stacked.flip(-1)
    return View(pixels=stacked[:3], mask=None if mask is None else stacked[3:])


def random_flip(image: ImageAndMask, generator: Generator, p: float = 0.5) -> View:
    """Return one view, flipped horizontally with probability `p`; it names no operation."""
    pixels, mask = image
    if draw(generator) < p:
        pixels, mask = pixels.flip(-1), None if mask is None else mask.flip(-1)
    return View(pixels=pixels, mask=mask)


MILD = 1.2  # size that a mild crop is cut from, relative to the view's


def weak(image: ImageAndMask, generator: Generator, *, p: float, grayscale_p: float) -> View:
    """Return one view for a method with few steps (TextBoost, arXiv 2409.08248v2, 5.1).

    With probability `p` it is flipped horizontally, with probability `p` enlarged by `MILD` and cropped anywhere;
    neither is named. With probability `grayscale_p` it has no colour, and that is.
    """
    view = random_flip(image, generator, p)
    stacked = view.pixels if view.mask is None else torch.cat([view.pixels, view.mask])
    if draw(generator) < p:
        stacked = cropped(stacked, MILD, generator)
    gray = draw(generator) < grayscale_p
    return View(
        pixels=grayscale(stacked[:3]) if gray else stacked[:3],
        mask=None if view.mask is None else stacked[3:],
        operations=("grayscale",) if gray else (),
    )


BLANK = 0.5  # mid-gray, the autoencoder's zero
LATENT = 8  # pixels of a latent's side


def resized(image: ImageAndMask, generator: Generator, p: float = 0.5) -> View:
    """Return one view at another size, with a mask of where it shows the image (Custom Diffusion).

    With probability 2/3 the size is uniform in 1/3..1: below 0.6 the image is shrunk and lies anywhere on a blank
    canvas, from 0.6 on it stays as it is. With probability 1/3 it is uniform in 1.2..1.4, cropped anywhere. Before
    that the image is flipped horizontally with probability `p`.
    """
    view = random_flip(image, generator, p)
    stacked = torch.cat([view.pixels, torch.ones_like(view.pixels[:1]) if view.mask is None else view.mask])
    factor = draw(generator, 1 / 3, 1.0) if draw(generator) < 2 / 3 else draw(generator, 1.2, 1.4)
    names: tuple[str, ...] = ()
    if factor < 0.6:
        stacked, names = on_canvas(stacked, factor, generator), ("zoom-out",)
    elif factor > 1:
        stacked, names = cropped(stacked, factor, generator), ("zoom-in",)
    return View(pixels=stacked[:3], mask=stacked[3:], operations=names)


def on_canvas(stacked: Tensor, factor: float, generator: Generator) -> Tensor:
    """Shrink an image above its mask, `[4, h, w]`, by `factor`, anywhere on a blank image of that shape.

    The mask leaves out one latent at the seam, where the autoencoder sees the blank as well.
    """
    size = stacked.shape[-2:]
    small = resize(stacked, *(max(1, round(side * factor)) for side in size))
    seam = min(LATENT, *(side // 4 for side in small.shape[-2:]))
    small[3:] *= F.pad(torch.ones_like(small[3:, seam:-seam, seam:-seam]), (seam,) * 4) if seam else 1
    canvas = torch.cat([torch.full_like(stacked[:3], BLANK), torch.zeros_like(stacked[3:])])
    top, left = (_place(side - part, generator) for side, part in zip(size, small.shape[-2:], strict=True))
    canvas[:, top : top + small.shape[-2], left : left + small.shape[-1]] = small
    return canvas


def cropped(stacked: Tensor, factor: float, generator: Generator) -> Tensor:
    """Enlarge `[c, h, w]` by `factor` and crop it to its shape, anywhere."""
    height, width = stacked.shape[-2:]
    large = resize(stacked, round(height * factor), round(width * factor))
    top, left = _place(large.shape[-2] - height, generator), _place(large.shape[-1] - width, generator)
    return large[:, top : top + height, left : left + width]


def _place(room: int, generator: Generator) -> int:
    """Draw a whole number from 0 to `room`, equally likely."""
    return int(torch.randint(room + 1, (), generator=generator))


def rotate(image: Tensor, degrees: float) -> Tensor:
    """Rotate `[c, h, w]` counter-clockwise about its centre and shrink it, so that all of it fits into its shape.

    Bilinear; around it the image is reflected at its edges.
    """
    height, width = image.shape[-2:]
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    ratio = height / width
    shrunk = max(abs(cos) + abs(sin) * ratio, abs(cos) + abs(sin) / ratio)  # what encloses it, relative to its shape
    theta = shrunk * image.new_tensor([[cos, -sin * ratio, 0.0], [sin / ratio, cos, 0.0]])
    grid = F.affine_grid(theta[None], [1, *image.shape], align_corners=False)
    return F.grid_sample(image[None], grid, padding_mode="reflection", align_corners=False)[0]


def views(
    concept: Concept,
    indices: Iterable[int],
    size: tuple[int, int],
    generator: Generator,
    augment: Callable[[ImageAndMask, Generator], View],
    cuts: Cuts | None = None,
) -> Iterator[View]:
    """Yield an augmented view of each of the reference images `indices`, at a height and width.

    Args:
        cuts: what was cut already, and the device on which the views are made; by default nothing, on the CPU.
    """
    cuts = cuts or Cuts(concept, torch.device("cpu"))
    for index in indices:
        view = augment(cuts(index, size, generator), generator)
        yield replace(view, image=index)
