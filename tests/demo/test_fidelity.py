"""Does a short training on the tiny model teach the subject, and do prompts keep working? The whole method at once.

The demo's dog, one image, 60 steps from the bare class word; how alike the images become is measured in
benchmarks/fidelity.py. Here the question is only whether the method works at all: a loss that falls would not show it.
"""

import random

import numpy as np
import pytest
import torch

from personalize.demo import build, evaluators, show, world
from personalize.trainers import images
from personalize.trainers.data.concept import Concept
from personalize.trainers.models.checkpoint import load_models
from personalize.trainers.models.sampler import sample
from personalize.trainers.recipes.textboost import TextBoost
from personalize.trainers.runs import train
from personalize.trainers.runs.run import Run

pytestmark = pytest.mark.slow

SCENES = ("a photo of a {} in the snow", "a photo of a {} on grass", "a photo of a {} on the beach")


def draw(models, noun):
    """Two images per scene, the same noise for every class word."""
    prompts = [scene.format(noun) for scene in SCENES for _ in range(2)]
    pixels = sample(models, prompts, [0, 1] * len(SCENES), size=(128, 128), steps=15, guidance=4.0)
    return [images.to_pil(picture) for picture in pixels]


def right_scenes(metric_models, pictures):
    """How many images fit the place that their prompt names better than every other place of the world.

    CLIP-T itself would not do: real drawings of a spotted dog already fit "a dog" less than any dog does.
    """
    texts = [f"a photo of a dog {place}" for place in world.BACKGROUNDS]
    scores = torch.stack([metric_models.clip_text(pictures, [text] * len(pictures)) for text in texts])
    chosen = [texts[i] for i in scores.argmax(dim=0).tolist()]
    return sum(text == SCENES[i // 2].format("dog") for i, text in enumerate(chosen))


def test_one_image_teaches_the_subject(tmp_path):
    path = build.build_checkpoint(tmp_path / "tiny.safetensors")
    dog = world.instance(show.INSTANCE, "dog")
    reference = world.picture(world.draw(dog, world.reference_scene(), random.Random(5)))
    pixels = torch.from_numpy(np.array(reference.convert("RGB"))).permute(2, 0, 1).float() / 255
    recipe = TextBoost(steps=60, views=48, lora_learning_rate=2e-3, embedding_learning_rate=1e-2)
    run = Run(concept=Concept(images=(pixels,), resolution=128), recipe=recipe)

    models = load_models(path, build.UNET, build.HEADS).to("cpu", torch.float32)
    before = draw(models, "dog")
    train.train(run, models, tmp_path / "run")
    after = draw(models, "<concept>")

    metric_models = evaluators.load("cpu")
    identity = [metric_models.identity(pictures, [reference]).mean().item() for pictures in (before, after)]
    scenes = [right_scenes(metric_models, pictures) for pictures in (before, after)]
    print(f"identity {identity[0]:.3f} -> {identity[1]:.3f}, right scenes {scenes[0]} -> {scenes[1]} of {len(after)}")
    assert identity[1] > identity[0] + 0.1
    assert scenes[1] >= scenes[0] - 1
