"""The demo world: captioned pixel art of 16 x 16 tiles (a tile is a flat square of 8 x 8 px, an image 128 x 128 px).

An Instance is one individual thing, a Scene one way to take its image; draw() makes the image and captions.py
words it. Captions name an instance's class always, its primary colour, pattern and accessory sometimes, and its
second colour, exact shades, proportions and pattern period never: those are what personalisation has to learn from a
image. Everything is decided by the random.Random given. This file draws; it neither trains nor scores anything.
"""

import random
from dataclasses import dataclass, field

import numpy as np
from PIL import Image

from . import sprites
from .backgrounds import BACKGROUNDS, background

TILES, TILE = 16, 8
SUBJECTS = tuple(sprites.SUBJECTS)
COLOURS = {
    "red": (212, 40, 44),
    "orange": (246, 140, 26),
    "yellow": (250, 220, 50),
    "green": (36, 156, 60),
    "blue": (44, 84, 216),
    "purple": (136, 56, 176),
    "pink": (246, 116, 184),
    "brown": (124, 76, 40),
    "white": (242, 242, 242),
    "black": (34, 34, 38),
}
PATTERNS = ("plain", "striped", "pinstriped", "dotted", "checkered")
EXTRAS = ("none", "hat", "flag", "ball", "star")
STYLES = ("photo", "painting", "sketch")
DISTANCES = ("", "far away", "close up")
SIDES = ("", "on the left", "on the right")
LIGHTS = ("", "dark", "bright")
# Three disjoint ranges of instance seeds: what the generator, the evaluators and nobody has seen in training.
TRAINING_SEEDS = range(0, 1_000_000)
EVALUATOR_SEEDS = range(1_000_000, 2_000_000)
TEST_SEEDS = range(2_000_000, 3_000_000)


@dataclass(frozen=True)
class Instance:
    """One individual thing. period is the pattern's, in tiles; shape is (aspect, k1, k2) for sprites.py."""

    subject: str
    colour: str
    pattern: str
    extra: str
    extra_colour: str
    second: str
    period: int
    shape: tuple
    rgb: tuple
    second_rgb: tuple
    extra_rgb: tuple


@dataclass(frozen=True)
class Scene:
    """One way to take an image. flip mirrors the whole finished image; side is the side in the finished image."""

    background: str = "on a wooden floor"
    style: str = "photo"
    distance: str = ""
    side: str = ""
    light: str = ""
    flip: bool = field(default=False)
    gray: bool = field(default=False)
    cropped: bool = field(default=False)
    collage: bool = field(default=False)


def _shade(rng, name: str) -> tuple:
    return tuple(min(255, max(0, value + rng.randint(-16, 16))) for value in COLOURS[name])


def sample_instance(rng: random.Random, subject: str | None = None) -> Instance:
    """A random individual, of the given class if one is given. The three colours always differ."""
    subject = subject or rng.choice(SUBJECTS)
    colour, second, extra = rng.sample(list(COLOURS), 3)
    pattern, period = rng.choice(PATTERNS), rng.choice((2, 3))
    shape = (rng.uniform(0.86, 1.16), rng.random(), rng.random())
    shades = [_shade(rng, name) for name in (colour, second, extra)]
    return Instance(subject, colour, pattern, rng.choice(EXTRAS), extra, second, period, shape, *shades)


def instance(seed: int, subject: str | None = None) -> Instance:
    """The individual of a seed; take seeds from the three ranges above."""
    return sample_instance(random.Random(f"instance {seed}"), subject)


def sample_scene(rng: random.Random) -> Scene:
    """A random scene. At most one of collage and crop; a crop has no other framing."""
    kind = rng.choices(("whole", "cropped", "collage"), (0.91, 0.05, 0.04))[0]
    whole = kind == "whole"
    distance = rng.choices(DISTANCES, (0.68, 0.16, 0.16))[0] if whole else ""
    side = rng.choices(SIDES, (0.7, 0.15, 0.15))[0] if whole and distance != "close up" else ""
    style = rng.choices(STYLES, (0.64, 0.18, 0.18))[0] if kind != "collage" else "photo"
    light = rng.choices(LIGHTS, (0.88, 0.06, 0.06))[0] if style == "photo" else ""
    place = rng.choice(tuple(BACKGROUNDS))
    return Scene(
        place,
        style,
        distance,
        side,
        light,
        rng.random() < 0.15,
        rng.random() < 0.06,
        kind == "cropped",
        kind == "collage",
    )


def reference_scene() -> Scene:
    """The plain, neutral photo used as the one reference image of an individual."""
    return Scene()


def _pattern(labels, thing: Instance, x: int, y: int) -> np.ndarray:
    """True where a tile of the body shows the second colour."""
    row, column = np.mgrid[:TILES, :TILES]
    row, column, period = row - y, column - x, thing.period
    masks = {
        "plain": np.zeros_like(row, bool),
        "striped": row % period == 0,
        "pinstriped": column % period == 0,
        "dotted": (row % 2 == 0) & ((column + row // 2 * (period // 2)) % period == 0),
        "checkered": (row // (period - 1) + column // (period - 1)) % 2 == 0,
    }
    return masks[thing.pattern] & (labels == sprites.BODY)


def _palette(thing: Instance) -> np.ndarray:
    """Colour of every label, [13, 3]; eyes are pale on a dark head."""
    light = np.dot(thing.rgb, (0.3, 0.59, 0.11)) > 90
    eye = (24, 24, 30) if light else (250, 236, 120)
    fixed = [
        (36, 36, 42),
        (248, 246, 238),
        (128, 132, 142),
        (110, 70, 38),
        (176, 224, 244),
        eye,
        (228, 120, 130),
        (255, 242, 150),
    ]
    return np.array([(0, 0, 0), thing.rgb, thing.rgb, thing.second_rgb, thing.extra_rgb, *fixed], "float32")


def _place(scene: Scene, rng) -> tuple:
    """Centre in whole tiles (patterns stay aligned with the grid) and half height in tiles."""
    half = {"": (4.9, 5.7), "far away": (3.3, 4.0), "close up": (7.4, 8.6)}[scene.distance]
    columns = {"": (7, 9), "on the left": (3, 5), "on the right": (11, 13)}[scene.side]
    rows = (8, 9) if scene.distance == "close up" else (9, 10)
    x, y, height = rng.randint(*columns), rng.randint(*rows), rng.uniform(*half)
    if scene.cropped:
        x, y, height = rng.choice((3, 4, 12, 13)), rng.choice((4, 5, 11, 12)), rng.uniform(7.4, 8.6)
    return (TILES - x if scene.flip else x), y, height


def _edges(labels) -> np.ndarray:
    """True on tiles of the subject that touch a tile of the background."""
    solid = np.pad(labels > 0, 1)
    inner = solid[:-2, 1:-1] & solid[2:, 1:-1] & solid[1:-1, :-2] & solid[1:-1, 2:]
    return (labels > 0) & ~inner


def _photo(picture, labels, scene, dice):
    shadow = (labels == 0) & (np.roll(labels, 1, 0) > 0)
    shadow[0] = False
    picture = np.where(shadow[..., None], picture * 0.72, picture)
    fall = np.linspace(1.03, 0.95, TILES)[:, None, None]
    gain = {"": dice.uniform(0.97, 1.03), "dark": 0.62, "bright": 1.22}[scene.light]
    return picture * fall * gain + dice.normal(0, 1.5, (TILES, TILES, 1))


def _painting(picture, labels, scene, dice):
    """Richer colours, visible brush strokes (pairs of tiles brighter or darker) in a wooden frame."""
    grey = picture.mean(-1, keepdims=True)
    strokes = np.repeat(dice.choice((-13, 0, 13), (TILES, TILES // 2)), 2, 1)
    picture = grey + (picture - grey) * 1.35 + strokes[..., None]
    frame = np.ones((TILES, TILES), bool)
    frame[1:-1, 1:-1] = False
    return np.where(frame[..., None], np.array((150, 104, 36), "float32"), picture)


def _sketch(picture, labels, scene, dice):
    """Dark outline, pale fill, a faint trace of the background on paper."""
    paper = np.array((250, 247, 238), "float32")
    share = np.where(labels > 0, 0.5, 0.16)[..., None]
    pale = paper + (picture - paper) * share
    return np.where(_edges(labels)[..., None], 60 + 0.3 * (picture - 96), pale)


def _single(thing: Instance, scene: Scene, rng) -> np.ndarray:
    ground = background(scene.background, rng)
    x, y, half = _place(scene, rng)
    labels = sprites.label_map(thing.subject, thing.extra, thing.shape, x, y, half)
    colours = _palette(thing)[np.where(_pattern(labels, thing, x, y), sprites.SECOND, labels)]
    picture = np.where((labels > 0)[..., None], colours, ground)
    finish = {"photo": _photo, "painting": _painting, "sketch": _sketch}[scene.style]
    picture = finish(picture, labels, scene, np.random.default_rng(rng.getrandbits(48)))
    return picture[:, ::-1] if scene.flip else picture


def _collage(thing: Instance, scene: Scene, rng) -> np.ndarray:
    """Four images at half size (each tile the mean of four)."""
    small = [_single(thing, scene, rng).reshape(8, 2, 8, 2, 3).mean((1, 3)) for _ in range(4)]
    return np.concatenate([np.concatenate(small[:2], 1), np.concatenate(small[2:], 1)], 0)


def draw(thing: Instance, scene: Scene, rng: random.Random) -> np.ndarray:
    """Tile colours, uint8 [16, 16, 3]."""
    picture = _collage(thing, scene, rng) if scene.collage else _single(thing, scene, rng)
    if scene.gray:
        picture = np.repeat(picture @ np.array((0.3, 0.59, 0.11))[:, None], 3, -1)
    return np.clip(np.round(picture), 0, 255).astype("uint8")


def picture(tiles: np.ndarray, tile: int = TILE) -> Image.Image:
    """Tiles as an image of flat squares, 128 x 128 px by default."""
    return Image.fromarray(np.repeat(np.repeat(tiles, tile, 0), tile, 1))
