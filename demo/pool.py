"""Draws the images that the demo model is trained on into one safetensors file; captions are made at every use.

    python -m demo.pool .dev/train/pool.safetensors --instances 80000 --views 3      (about 3 minutes, two processes)

The file holds tiles (uint8 [N, 16, 16, 3]), which of them show a pattern or an accessory (bool [N, 16, 16]), the
instance seed of every image and its scene as small integers.
"""

import argparse
import random
from concurrent.futures import ProcessPoolExecutor
from dataclasses import astuple, fields, replace

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


def make_picture(seed: int, number: int) -> tuple:
    """Image number of the pool, of the individual seed: (tiles, detail mask, scene code).

    The detail mask is True where the image differs from one of the same individual without pattern and accessory.
    """
    rng = random.Random(f"view {number} of {seed}")
    thing, scene, state = instance(seed), sample_scene(rng), rng.getstate()
    tiles = draw(thing, scene, rng)
    rng.setstate(state)
    bare = draw(replace(thing, pattern="plain", extra="none"), scene, rng)
    return tiles, (tiles != bare).any(-1), scene_code(scene)


def make_pool(seeds: range, views: int, processes: int = 2) -> dict:
    """views images of every instance of the seeds, each in another scene; deterministic."""
    owners = np.repeat(np.array(seeds, "int64"), views)
    with ProcessPoolExecutor(processes) as workers:
        pictures = workers.map(make_picture, owners.tolist(), range(len(owners)), chunksize=1000)
        tiles, details, scenes = map(np.stack, zip(*pictures))
    return {"tiles": tiles, "details": details, "scenes": scenes.astype("uint8"), "seeds": owners}


class Pool:
    """A pool file in memory: tiles [N, 16, 16, 3], details [N, 16, 16] and what is in image i."""

    def __init__(self, path: str):
        data = load_file(path)
        self.tiles, self.details = data["tiles"], data["details"]
        self.scenes, self.seeds = data["scenes"], data["seeds"].tolist()

    def __len__(self):
        return len(self.seeds)

    def content(self, index: int) -> tuple:
        """(Instance, Scene) of image index."""
        return instance(self.seeds[index]), scene_of(self.scenes[index])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out")
    parser.add_argument("--instances", type=int, default=80_000)
    parser.add_argument("--views", type=int, default=3)
    options = parser.parse_args()
    save_file(make_pool(TRAINING_SEEDS[: options.instances], options.views), options.out)
