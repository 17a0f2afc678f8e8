"""Draws the two images of README.md: the world itself, and what the tiny model makes of prompts.

python -m demo.sheets TOKENIZER      (half a minute, one thread; writes demo/world.png and demo/samples.png)
"""

import argparse
import random
from pathlib import Path

import torch

from . import world
from .backgrounds import BACKGROUNDS
from .export import load_exported
from .sample import PROMPTS, sample, sheet
from .text import Vocabulary

FOLDER = Path(__file__).resolve().parent
COLUMNS = 8


def world_sheet():
    """A row of each subject in the eight places, then two rows of random scenes; individuals from the test seeds."""
    rng, places = random.Random(5), list(BACKGROUNDS)
    pictures = []
    for number in range(COLUMNS * (len(world.SUBJECTS) + 2)):
        row, column = divmod(number, COLUMNS)
        subject = world.SUBJECTS[row] if row < len(world.SUBJECTS) else None
        scene = world.Scene(places[(row + column) % len(places)]) if subject else world.sample_scene(rng)
        pictures.append(world.draw(world.instance(world.TEST_SEEDS[number], subject), scene, rng))
    return sheet(pictures, COLUMNS)


def sample_prompts() -> list:
    """The training's watch list, then one prompt of every subject with other details, then framing words."""
    details = ("green", "white", "purple dotted", "yellow", "blue", "red striped", "orange", "pink")
    rest = [
        f"a photo of a {detail} {subject} {place}"
        for detail, subject, place in zip(details, world.SUBJECTS, reversed(BACKGROUNDS))
    ]
    framing = (
        "a photo of a blue dog with a yellow hat on grass, on the left",
        "a photo of a red cat on the beach, far away",
        "a painting of a green boat with a pink flag on water",
        "a sketch of a brown dog",
        "a photo of a yellow car in the desert, grayscale",
        "photo collage of a red house on grass",
    )
    return [*PROMPTS, *rest, *framing]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("tokenizer")
    parser.add_argument("--weights", type=Path, default=FOLDER / "weights")
    parser.add_argument("--out", type=Path, default=FOLDER)
    options = parser.parse_args()
    torch.set_num_threads(1)
    world_sheet().save(options.out / "world.png", optimize=True)
    words = Vocabulary(options.tokenizer)
    unet, text = load_exported(options.weights, words)
    prompts = sample_prompts()
    rows = sample(unet, text, words, prompts * 2, [seed for seed in (1, 2) for _ in prompts])
    order = [
        seed * len(prompts) + i
        for start in range(0, len(prompts), COLUMNS)
        for seed in (0, 1)
        for i in range(start, start + COLUMNS)
    ]
    sheet(rows[order], COLUMNS).save(options.out / "samples.png", optimize=True)
