"""How often the tiny model draws what the prompt says, as the demo's evaluators read it, beside real images.

    python -m demo.measure TOKENIZER --count 256                    (2 minutes, one thread)
    python -m demo.measure TOKENIZER --transformer --guidance 3     (5 minutes)

Prompts name all nameable details of unseen individuals and a place: "a photo of a black striped cat with a red hat in
the snow". Subject, colour, pattern and accessory are read by the instance encoder's probes, the place by the best of
eight captions of the small CLIP. Real images are drawings of the same individuals in the same places: what the
readers make of them is the ceiling.
"""

import argparse
import math
import random
from pathlib import Path

import torch
from safetensors.torch import load_file

from . import evaluators, transformer, world
from .backgrounds import BACKGROUNDS
from .build import unpacked
from .captions import describe
from .export import load_exported
from .sample import sample
from .text import Vocabulary

READ = ("subject", "colour", "pattern", "extra", "extra_colour")
PLACES = tuple(BACKGROUNDS)
BATCH = 32


def read_places(metric_models, pictures, things) -> list:
    """The place whose caption suits the image best, by the small CLIP."""
    scores = [
        metric_models.clip_text(pictures, [f"a photo of a {thing.subject} {place}" for thing in things])
        for place in PLACES
    ]
    return [PLACES[i] for i in torch.stack(scores).argmax(0).tolist()]


def shares(metric_models, pictures, things, scenes) -> dict:
    """Share of images in which each detail is read as it should be, with the number of images that count."""
    read = metric_models.attributes(pictures)
    result = {}
    for name in READ:
        rows = [(answer, thing) for answer, thing in zip(read, things) if evaluators.visible(thing, name)]
        result[name] = (sum(answer[name] == getattr(thing, name) for answer, thing in rows) / len(rows), len(rows))
    right = [place == scene.background for place, scene in zip(read_places(metric_models, pictures, things), scenes)]
    return result | {"background": (sum(right) / len(right), len(right))}


def generate(folder: Path, tokenizer: str, prompts: list, options) -> list:
    words = Vocabulary(tokenizer)
    unet, text = load_exported(folder, words)
    encoded, pictures = transformer.Captions(text, words), []
    weights = unpacked(load_file(folder / "transformer.safetensors")) if options.transformer else {}
    for start in range(0, len(prompts), BATCH):
        some, how = prompts[start : start + BATCH], (options.steps, options.guidance)
        seeds = range(start, start + len(some))
        if weights:
            pictures.extend(transformer.sample(weights, encoded(some), encoded([""] * len(some)), seeds, *how))
        else:
            pictures.extend(sample(unet, text, words, some, seeds, *how))
    return [world.picture(tiles) for tiles in pictures]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("tokenizer")
    parser.add_argument("--weights", type=Path, default=Path(__file__).resolve().parent / "weights")
    parser.add_argument("--count", type=int, default=256)
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--guidance", type=float, default=4.0)
    parser.add_argument("--transformer", action="store_true", help="the transformer instead of the U-Net")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rng = random.Random(3)
    things = [world.instance(seed) for seed in world.TEST_SEEDS[1000 : 1000 + options.count]]
    scenes = [world.Scene(rng.choice(PLACES)) for _ in things]
    prompts = [f"a photo of {describe(thing)} {scene.background}" for thing, scene in zip(things, scenes)]
    metric_models = evaluators.load()
    real = shares(metric_models, [world.picture(world.draw(t, s, rng)) for t, s in zip(things, scenes)], things, scenes)
    made = generate(options.weights, options.tokenizer, prompts, options)
    for name, (share, count) in shares(metric_models, made, things, scenes).items():
        error = math.sqrt(share * (1 - share) / count)
        print(f"{name}: {share:.2f} (standard error {error:.2f}, n = {count}), real pictures {real[name][0]:.2f}")
