"""TextBoost's own parts: captions, views, rows for mixing, the LoRA of the U-Net. (Any recipe: test_recipes.py.)

Small random models on the CPU; the latents of a plain gray image tell which one it is.
"""

import dataclasses

import pytest
import torch

from personalize.tests.support import small
from personalize.trainers.data.concept import Concept
from personalize.trainers.data.context import Context
from personalize.trainers.data.templates import TEMPLATES
from personalize.trainers.device import SingleDevice
from personalize.trainers.recipes.textboost import PRESETS, TextBoost
from personalize.trainers.recipes.textual_inversion import TextualInversion
from personalize.trainers.runs import train as training
from personalize.trainers.runs.run import Run
from personalize.trainers.settings import changed
from personalize.trainers.training.loop import forward_backward
from personalize.trainers.training.objective import Objective
from personalize.trainers.training.stage import freeze_all_but

FAST = TextBoost(steps=3, batch_size=4, views=8, captions=small.CAPTIONS)
GRAYS = (0.0, 0.5, 1.0)


def concept(**changes):
    pictures = tuple(torch.full((3, 32, 32), gray) for gray in GRAYS)
    return Concept(**{"images": pictures, "resolution": 32, "initializer_token": "corgi dog"} | changes)


def train(recipe, folder, models=None):
    return training.train(Run(concept=concept(), recipe=recipe), models or small.models(), folder)


def test_unet_lora_trains_in_float32_beside_a_half_precision_unet():
    """Its gradients are those of a float32 U-Net but for rounding: 3 more bits make their error 8 times smaller."""

    def gradients(dtype):
        models = small.models().to("cpu", dtype)
        generator = torch.Generator().manual_seed(0)
        stage = next(dataclasses.replace(FAST, unet_lora_rank=4).stages(models, concept(), generator, Context()))
        freeze_all_but(stage, models)
        objective = Objective(models, {name: loss for name, (_, loss) in stage.losses.items()})
        device = SingleDevice(device=torch.device("cpu"), dtype=dtype)
        forward_backward(stage, objective, device, generator, 0)
        lora = stage.params[-1]["params"]
        assert {p.dtype for p in lora} == {p.grad.dtype for p in lora} == {torch.float32}
        scale = device.scaler.get_scale() if device.scaler.is_enabled() else 1.0
        return torch.cat([p.grad.flatten() for p in lora]) / scale

    exact, coarse, fine = map(gradients, (torch.float32, torch.bfloat16, torch.float16))  # 24, 8 and 11 bits
    assert 4 < (coarse - exact).norm() / (fine - exact).norm() < 16
    assert (fine - exact).norm() < 0.05 * exact.norm()


def deltas(result):
    """What each layer's weight changes by, from the saved LoRA: (alpha / rank) B A."""
    layers = {key.removesuffix(".alpha") for key in result.lora if key.endswith(".alpha")}
    parts = {
        name: [result.lora[f"{name}.{p}"] for p in ("lora_down.weight", "lora_up.weight", "alpha")] for name in layers
    }
    return {name: alpha / len(down) * up @ down for name, (down, up, alpha) in parts.items() if "out_proj" not in name}


def test_an_object_and_a_style_never_change_the_same_output(tmp_path):
    """Rows 0, 2, 4 for objects and 1, 3, 5 for styles, as in the authors' code; the U-Net's LoRA trains whole."""
    recipe = dataclasses.replace(FAST, unet_lora_rank=2, weight_decay=0.5, lora_learning_rate=0.1)
    trained = {
        mixing: deltas(train(dataclasses.replace(recipe, mixing=mixing), tmp_path / mixing))
        for mixing in ("object", "style", "off")
    }
    for name in trained["off"]:
        moved = {mixing: delta[name].abs().amax(dim=1) > 0 for mixing, delta in trained.items()}
        masked = name.startswith("lora_te")
        odd = torch.arange(len(moved["off"])) % 2 == 1
        assert torch.equal(moved["object"], ~odd if masked else torch.ones_like(odd))
        assert torch.equal(moved["style"], odd if masked else torch.ones_like(odd))
        assert moved["off"].all()
    assert len({name.startswith("lora_te") for name in trained["off"]}) == 2  # both modules


def test_the_style_preset_is_the_authors():
    """150 steps of 4 images, p 0.8, rows of a style, and for images without a caption 19 templates."""
    style = PRESETS["style"]
    assert (style.steps, style.batch_size, style.augmentation_p, style.mixing) == (150, 4, 0.8, "style")
    templates = TEMPLATES[style.templates]
    assert len(templates) == 19 and len({*templates}) == 17  # two of them count twice there
    assert all(template.endswith(" in the style of {}") for template in templates)
    assert templates[0] == "a painting in the style of {}" and templates[-1] == "a large painting in the style of {}"
    assert sum("painting" in template for template in templates) == 16
    assert changed(TextualInversion(), {"templates": style.templates}).templates == style.templates


@pytest.mark.parametrize("views", [0, 24])
@pytest.mark.parametrize("preset", PRESETS)
def test_captions_take_the_place_of_templates(preset, views):
    """Each view of a batch has the caption of the image that it shows; an image without one a template."""
    captions = ("A house in {}", "", "{} on a {{hill}}")
    many = concept(captions=captions)
    recipe = dataclasses.replace(
        PRESETS[preset], views=views, batch_size=24, augmentation_p=0.0, grayscale_p=0.0, knowledge_weight=0.0
    )
    models = small.models()
    batch = next(next(recipe.stages(models, many, torch.Generator().manual_seed(0), Context())).batches)
    subject = recipe.subject(many)
    possible = [
        models.tokenize([f"A house in {subject}"]),
        models.tokenize([template.format(subject) for template in TEMPLATES[recipe.templates]]),
        models.tokenize([f"{subject} on a {{{{hill}}}}"]),
    ]
    shown = [round(latents.mean().item()) // 2 + 1 for latents in batch.latents]  # the latents are -2, 0 and 2
    assert set(shown) == {0, 1, 2}
    for picture, ids in zip(shown, batch.input_ids, strict=True):
        assert (possible[picture] == ids).flatten(1).all(dim=1).any()


def test_fresh_views_encode_in_every_step(tmp_path):
    models = small.models()
    calls, encode = [], models.encode_images
    models.encode_images = lambda pixels: calls.append(len(pixels)) or encode(pixels)
    train(dataclasses.replace(FAST, views=0), tmp_path / "fresh", models)
    assert calls == [4, 4, 4]
    models = small.models()
    models.encode_images = lambda pixels: calls.append(len(pixels)) or encode(pixels)
    calls.clear()
    train(FAST, tmp_path / "pool", models)
    assert calls == [8]  # all before the first step


def test_a_pool_shows_every_image_equally_often():
    models, values = small.models(), []
    encode = models.encode_images
    models.encode_images = lambda pixels: values.extend(pixels.mean(dim=(1, 2, 3)).tolist()) or encode(pixels)
    recipe = dataclasses.replace(FAST, views=9, augmentation_p=0.0, grayscale_p=0.0)
    next(recipe.stages(models, concept(), torch.Generator().manual_seed(0), Context()))
    assert values == [*GRAYS] * 3


@pytest.mark.parametrize("views", [0, 8])
def test_the_generator_alone_knows_the_next_batch(views):
    """A run that is taken up again needs no memory of which image came last."""

    def batches():
        generator = torch.Generator().manual_seed(0)
        recipe = dataclasses.replace(FAST, views=views)
        return generator, next(recipe.stages(small.models(), concept(), generator, Context())).batches

    generator, going = batches()
    for _ in range(4):
        next(going)
    state = generator.get_state()
    expected = next(going)
    generator, resumed = batches()
    generator.set_state(state)
    found = next(resumed)
    assert torch.equal(found.latents, expected.latents) and torch.equal(found.input_ids, expected.input_ids)
