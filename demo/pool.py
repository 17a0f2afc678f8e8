"""Draws the pictures that the demo model is trained on into one safetensors file; captions are made at every use.

    python -m demo.pool .dev/train/pool.safetensors --instances 80000 --views 3      (about 3 minutes, one thread)

The file holds tiles (uint8 [N, 16, 16, 3]), the instance seed of every picture and its scene as small integers.
"""

import argparse
import random
from dataclasses import astuple, fields

import numpy as np
from safetensors.numpy import load_file, save_file

from .backgrounds import BACKGROUNDS
from .world import DISTANCES, LIGHTS, SIDES, STYLES, TRAINING_SEEDS, Scene, draw, instance, sample_scene

BOOL = (False, True)
CHOICES = (tuple(BACKGROUNDS), STYLES, DISTANCES, SIDES, LIGHTS, BOOL, BOOL, BOOL, BOOL)
assert len(CHOICES) == len(fields(Scene))


def scene_code(scene: Scene) -> list:
    return [choices.index(value) for choices, value in zip(CHOICES, astuple(scene))]


def scene_of(code) -> Scene:
    return Scene(*(choices[int(index)] for choices, index in zip(CHOICES, code)))


def make_pool(seeds: range, views: int) -> dict:
    """views pictures of every instance of the seeds, each in another scene; deterministic."""
    total = len(seeds) * views
    tiles, codes = np.zeros((total, 16, 16, 3), "uint8"), np.zeros((total, len(CHOICES)), "uint8")
    for number, seed in enumerate(np.repeat(np.array(seeds), views).tolist()):
        rng = random.Random(f"view {number} of {seed}")
        scene = sample_scene(rng)
        tiles[number], codes[number] = draw(instance(seed), scene, rng), scene_code(scene)
    return {"tiles": tiles, "scenes": codes, "seeds": np.repeat(np.array(seeds, "int64"), views)}


class Pool:
    """A pool file in memory: tiles [N, 16, 16, 3] and what is in picture i."""

    def __init__(self, path: str):
        data = load_file(path)
        self.tiles, self.scenes, self.seeds = data["tiles"], data["scenes"], data["seeds"].tolist()

    def __len__(self):
        return len(self.seeds)

    def content(self, index: int) -> tuple:
        """(Instance, Scene) of picture index."""
        return instance(self.seeds[index]), scene_of(self.scenes[index])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out")
    parser.add_argument("--instances", type=int, default=80_000)
    parser.add_argument("--views", type=int, default=3)
    options = parser.parse_args()
    save_file(make_pool(TRAINING_SEEDS[: options.instances], options.views), options.out)
