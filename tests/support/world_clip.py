"""The demo world's CLIP as a user's file in a user's folder, and images that it knows. No test in here."""

import random

import numpy as np
import torch

from personalize.demo import evaluators, world
from personalize.trainers.metrics.clip import ClipConfig
from personalize.trainers.metrics.extractor_cache import ExtractorCache

FILE = "world.safetensors"
CHOICE = ClipConfig(clip_model=evaluators.CLIP_NAME, clip_weights=FILE)


def write(folder):
    """`Backbones` that look into a folder which holds the world's CLIP."""
    evaluators.register()
    evaluators.expand_clip(evaluators.WEIGHTS / "evaluator_clip.safetensors", folder / FILE)
    return ExtractorCache(folders=lambda: [folder])


def pictures(subject="dog", count=2):
    """Of an individual that no training saw, as PIL images."""
    scenes = [world.Scene(words) for words in ("in the snow", "on grass", "at night", "on water")][:count]
    thing = world.instance(world.TEST_SEEDS[100], subject)
    return [world.picture(world.draw(thing, scene, random.Random(f"{scene}"))) for scene in scenes]


def tensors(images):
    """`[3, h, w]` in 0..1 of each image."""
    return tuple(torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255 for image in images)
