"""TextBoost's paired augmentation: a picture and its prompt change together.

A picture that is shown larger, flipped or in a collage is also described so; the learned word then need not explain
the change. Masks follow every geometric operation. Everything is drawn from the generator that is passed in.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from ..digest import choose, draw
from ..images import resize
from .concept import Concept, Cuts
from .latents import View

# Operation -> learned token and the words it starts from. "ktn", "pll" and "ucd" are rare strings without a meaning.
TOKENS = {
    "grayscale": ("<grayscale>", "grayscale"),
    "zoom-in": ("<zoom-in>", "zoom in"),
    "zoom-out": ("<zoom-out>", "far away"),
    "collage": ("<collage>", "photo collage"),
    "crop": ("<crop>", "crop"),
    "hflip": ("<hflip>", "ktn"),
    "left": ("<left>", "pll"),
    "right": ("<right>", "ucd"),
}
# The same in plain words, for training without learned tokens.
WORDS = {
    "grayscale": ("grayscale",),
    "zoom-in": ("zoomed in", "close up"),
    "zoom-out": ("a far away", "very small"),
    "collage": ("photo collage of",),
    "crop": ("cropped",),
    "hflip": ("horizontally flipped",),
    "left": ("on the left",),
    "right": ("on the right",),
}

Picture = tuple[Tensor, Tensor | None]  # [3, h, w] and its mask [1, h, w]


def augment(
    picture: Picture, generator: Generator, p: float = 0.5, grayscale_p: float = 0.2, kinds: str = "all"
) -> View:
    """One view of a picture, of the same shape: three independent draws that stack.

    With probability `p` one geometric operation of `kinds`; with probability `p` a collage, if they include it; with
    probability `grayscale_p` no colour.
    """
    pixels, mask = picture
    stacked, layers = (pixels if mask is None else torch.cat([pixels, mask])), []
    if draw(generator) < p:
        stacked, name = choose(GEOMETRY[kinds], generator)(stacked, generator)
        layers += [name] if name else []
    if "collage" in NAMES[kinds] and draw(generator) < p:
        stacked = collage(stacked, choose((2, 3), generator))
        layers.append("collage")
    if draw(generator) < grayscale_p:
        stacked = torch.cat([grayscale(stacked[:3]), stacked[3:]])
        layers.append("grayscale")
    return View(pixels=stacked[:3], mask=None if mask is None else stacked[3:], operations=tuple(layers))


def scale(picture: Tensor, generator: Generator) -> tuple[Tensor, str | None]:
    """Zoom by 0.34 to 1.4 about the centre; what is missing repeats the edge. Named only where it is plain to see."""
    factor = draw(generator, 0.34, 1.4)
    name = "zoom-out" if factor < 0.6 else "zoom-in" if factor > 1.2 else None
    return zoom(picture, factor), name


def zoom(picture: Tensor, factor: float) -> Tensor:
    height, width = picture.shape[-2:]
    scaled = resize(picture, *(max(1, round(side * factor)) for side in (height, width)))
    rows, columns = height - scaled.shape[-2], width - scaled.shape[-1]  # missing, or too many where negative
    top, left = rows // 2, columns // 2
    if factor > 1:
        return scaled[:, -top : height - top, -left : width - left]
    return F.pad(scaled[None], (left, columns - left, top, rows - top), mode="replicate")[0]


def crop(picture: Tensor, generator: Generator) -> tuple[Tensor, str]:
    """A random part of the same shape and 8 to 100 % of the area, enlarged to the full size."""
    full = picture.shape[-2:]
    share = math.sqrt(draw(generator, 0.08, 1.0))
    height, width = (max(1, round(side * share)) for side in full)
    top, left = round(draw(generator) * (full[0] - height)), round(draw(generator) * (full[1] - width))
    return resize(picture[:, top : top + height, left : left + width], *full), "crop"


def shift(picture: Tensor, generator: Generator) -> tuple[Tensor, str]:
    """Moved left or right by 15 to 30 % of the width; what is missing repeats the edge."""
    pixels = round(draw(generator, 0.15, 0.30) * picture.shape[-1])
    name = choose(("left", "right"), generator)
    padding = (0, pixels) if name == "left" else (pixels, 0)
    padded = F.pad(picture[None], (*padding, 0, 0), mode="replicate")[0]
    return (padded[..., pixels:] if name == "left" else padded[..., : picture.shape[-1]]), name


def flip(picture: Tensor, generator: Generator) -> tuple[Tensor, str]:
    """Left and right exchanged."""
    return picture.flip(-1), "hflip"


# Which geometric operations may be drawn, and all names that a view may then have, in the order of TOKENS. A style
# lies in strokes and proportions: it survives a mirror, not a zoom.
GEOMETRY = {"all": (scale, crop, shift, flip), "flip": (flip,)}
NAMES = {"all": tuple(TOKENS), "flip": ("grayscale", "hflip")}


def collage(picture: Tensor, tiles: int) -> Tensor:
    """`tiles` x `tiles` small copies, each with a black edge of one pixel; a mask counts the edge as background."""
    rows, columns = ([round(i * side / tiles) for i in range(tiles + 1)] for side in picture.shape[-2:])
    result = torch.zeros_like(picture)
    for top, bottom in zip(rows, rows[1:], strict=False):
        for left, right in zip(columns, columns[1:], strict=False):
            small = resize(picture, bottom - top - 2, right - left - 2)
            result[:, top + 1 : bottom - 1, left + 1 : right - 1] = small
    return result


def grayscale(pixels: Tensor) -> Tensor:
    """ITU-R 601 luma in all three channels."""
    luma = (pixels * pixels.new_tensor([0.299, 0.587, 0.114])[:, None, None]).sum(dim=0, keepdim=True)
    return luma.expand(3, -1, -1)


def phrase(operation: str, named: str, generator: Generator) -> str:
    """What stands for an operation in a prompt: its learned token or plain words."""
    return TOKENS[operation][0] if named == "tokens" else choose(WORDS[operation], generator)


def describe(prompt: str, operations: tuple[str, ...], named: str, generator: Generator) -> str:
    """The prompt with a phrase for every operation where its kind belongs; with `named="none"` unchanged.

    Zoom and collage stand before the prompt, left and right after it, grayscale after a comma, crop and flip before
    it or after a comma, evenly.
    """
    for name in operations if named != "none" else ():
        words = phrase(name, named, generator)
        if name in ("left", "right"):
            prompt = f"{prompt} {words}"
        elif name == "grayscale" or (name in ("crop", "hflip") and draw(generator) < 0.5):
            prompt = f"{prompt}, {words}"
        else:
            prompt = f"{words} {prompt}"
    return prompt


def random_rotation(
    picture: Picture, generator: Generator, p: float = 0.75, degrees: float = 45.0, flip_p: float = 0.25
) -> View:
    """One view for a method with a single prompt (AttnDreamBooth): turned, mirrored, and nothing of it said.

    With probability `p` turned about the centre by up to `degrees` either way; what was outside the picture is its
    reflection. With probability `flip_p` left and right exchanged.
    """
    pixels, mask = picture
    stacked = pixels if mask is None else torch.cat([pixels, mask])
    if draw(generator) < p:
        stacked = rotate(stacked, draw(generator, -degrees, degrees))
    if draw(generator) < flip_p:
        stacked = stacked.flip(-1)
    return View(pixels=stacked[:3], mask=None if mask is None else stacked[3:])


def random_flip(picture: Picture, generator: Generator, p: float = 0.5) -> View:
    """One view: left and right exchanged with probability `p`, and nothing of it said."""
    pixels, mask = picture
    if draw(generator) < p:
        pixels, mask = pixels.flip(-1), None if mask is None else mask.flip(-1)
    return View(pixels=pixels, mask=mask)


BLANK = 0.5  # mid-gray, the autoencoder's zero
LATENT = 8  # pixels of a latent's side


def resized(picture: Picture, generator: Generator, p: float = 0.5) -> View:
    """One view at another size, and a mask of where it shows the picture (Custom Diffusion).

    With 2/3 a size uniform in 1/3..1: below 0.6 the picture is shrunk and lies somewhere on a blank canvas, above it
    stays as it is. With 1/3 a size uniform in 1.2..1.4, cropped anywhere. Before, left and right are exchanged with
    probability `p`.
    """
    view = random_flip(picture, generator, p)
    stacked = torch.cat([view.pixels, torch.ones_like(view.pixels[:1]) if view.mask is None else view.mask])
    factor = draw(generator, 1 / 3, 1.0) if draw(generator) < 2 / 3 else draw(generator, 1.2, 1.4)
    names = ()
    if factor < 0.6:
        stacked, names = on_canvas(stacked, factor, generator), ("zoom-out",)
    elif factor > 1:
        stacked, names = cropped(stacked, factor, generator), ("zoom-in",)
    return View(pixels=stacked[:3], mask=stacked[3:], operations=names)


def on_canvas(stacked: Tensor, factor: float, generator: Generator) -> Tensor:
    """A picture above its mask, `[4, h, w]`, shrunk by `factor` and anywhere on a blank picture of that size.

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
    """`[c, h, w]` enlarged by `factor`, and of that a part of the same shape, anywhere."""
    height, width = stacked.shape[-2:]
    large = resize(stacked, round(height * factor), round(width * factor))
    top, left = _place(large.shape[-2] - height, generator), _place(large.shape[-1] - width, generator)
    return large[:, top : top + height, left : left + width]


def _place(room: int, generator: Generator) -> int:
    """0 to `room`, evenly."""
    return torch.randint(room + 1, (), generator=generator).item()


def rotate(picture: Tensor, degrees: float) -> Tensor:
    """`[c, h, w]` turned counter-clockwise about its centre, reflected at its edges."""
    height, width = picture.shape[-2:]
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    theta = picture.new_tensor([[cos, -sin * height / width, 0.0], [sin * width / height, cos, 0.0]])
    grid = F.affine_grid(theta[None], [1, *picture.shape], align_corners=False)
    return F.grid_sample(picture[None], grid, padding_mode="reflection", align_corners=False)[0]


def views(
    concept: Concept,
    pictures: Iterable[int],
    size: tuple[int, int],
    generator: Generator,
    augment: Callable[[Picture, Generator], View],
    cuts: Cuts | None = None,
) -> Iterator[View]:
    """An augmented view of each of `pictures`, reference pictures by their index, at a height and width.

    Args:
        cuts: what was cut already, and the device on which the views are made; by default nothing, on the CPU.
    """
    cuts = cuts or Cuts(concept, torch.device("cpu"))
    for picture in pictures:
        view = augment(cuts(picture, size, generator), generator)
        yield replace(view, picture=picture)
