"""Memory: is what the text encoders keep counted, and does computing it twice change nothing but the memory?"""

from dataclasses import replace

import pytest
import torch

from personalize.tests.support import small
from personalize.tests.trainers.recipes.test_attndreambooth import CONCEPT, recipe
from personalize.trainers.data.concept import Concept
from personalize.trainers.data.context import Context
from personalize.trainers.device import SingleDevice
from personalize.trainers.models.diffusion import Encoding
from personalize.trainers.models.families import SD1, SD2
from personalize.trainers.recipes import textboost, textboost_2026
from personalize.trainers.training import memory
from personalize.trainers.training.loop import train_stage
from personalize.trainers.training.stage import freeze_all_but

RECIPES = {
    "benchmark": replace(textboost.BENCHMARK, steps=2, batch_size=2, views=4, captions=("a red ball",)),
    "2026++": replace(textboost_2026.PLUS, steps=2, batch_size=2, views=4),
}


def stage_of(models, name):
    concept = Concept(images=(torch.rand(3, 32, 32, generator=torch.Generator().manual_seed(0)),), resolution=32)
    generator = torch.Generator().manual_seed(0)
    stage = next(RECIPES[name].stages(models, concept, generator, Context()))
    freeze_all_but(stage, models)
    return stage, generator


def real_bytes(encoder, prompts, dtype=torch.float32):
    """What autograd keeps of a text encoder's real pass beside its weights, and how many of the bytes are matrices."""
    weights = {t.untyped_storage().data_ptr() for t in (*encoder.parameters(), *encoder.buffers())}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor

    ids = encoder.tokenizer(["a photo of a <concept>"] * prompts)
    with (
        torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t),
        torch.autocast("cpu", dtype, dtype != torch.float32),
    ):
        output = encoder(ids)
    assert output[0].requires_grad
    return sum(size for size, _ in kept.values())


@pytest.mark.parametrize("name", RECIPES)
def test_what_a_prompt_keeps_lies_within_the_margin_of_the_count(name):
    """Counted without memory for one prompt; here the difference of three real prompts and one."""
    models = small.models()
    stage_of(models, name)
    encoder = models.text_encoders[0]
    real = (real_bytes(encoder, 3) - real_bytes(encoder, 1)) / 2
    counted = memory.text_activation_bytes(encoder, False)
    assert counted / memory.MARGIN <= real <= memory.MARGIN * counted


@pytest.mark.parametrize("name", RECIPES)
def test_copies_in_half_precision_lie_within_the_margin_of_the_count(name):
    models = small.models()
    stage_of(models, name)
    encoder = models.text_encoders[0]
    one, three = (real_bytes(encoder, n, torch.bfloat16) for n in (1, 3))
    copies = one - (three - one) / 2  # what does not grow with the prompts
    assert memory.cast_bytes(encoder) / memory.MARGIN <= copies <= memory.MARGIN * memory.cast_bytes(encoder)
    assert (three - one) / 2 <= memory.text_activation_bytes(encoder, False)


@pytest.mark.parametrize("name", RECIPES)
def test_computing_twice_keeps_as_little_of_a_prompt_as_counted(name):
    models = small.models()
    stage_of(models, name)
    encoder = models.text_encoders[0]
    models.save_memory(True)
    real = (real_bytes(encoder, 3) - real_bytes(encoder, 1)) / 2
    assert real <= memory.text_activation_bytes(encoder, True) < memory.text_activation_bytes(encoder, False)
    assert real_bytes(encoder, 1) < memory.text_activation_bytes(encoder, False)  # counting left it as it was


def test_what_does_not_train_keeps_nothing():
    models = small.models()
    assert memory.text_activation_bytes(models.text_encoders[0], False) == 0


@pytest.mark.parametrize("family", [SD1, SD2], ids=lambda family: family.name)
@pytest.mark.parametrize("name", RECIPES)
def test_computing_twice_changes_nothing(name, family):
    """The same parameters after two steps, whether activations of U-Net and text encoder are kept or not."""

    def trained(checkpointing):
        models = small.models(family=family)
        stage, generator = stage_of(models, name)
        models.save_memory(checkpointing)
        train_stage(stage, models, SingleDevice(device=torch.device("cpu")), generator)
        return stage.parameters()

    plain, twice = trained(False), trained(True)
    assert all(torch.allclose(p, t, atol=1e-6) for p, t in zip(plain, twice, strict=True))


def unet_bytes(models, stage, dtype):
    """What autograd really keeps of the U-Net's pass for 1 and for 3 samples, beside its weights."""
    weights = {p.untyped_storage().data_ptr() for p in models.unet.parameters()}
    found = []
    for n in (1, 3):
        kept = {}

        def pack(tensor, kept=kept):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in weights:
                kept[storage.data_ptr()] = (storage.nbytes(), tensor)
            return tensor

        latents, states = torch.randn(n, 4, 8, 8), torch.randn(n, 77, 32, requires_grad=True)
        device = SingleDevice(device=torch.device("cpu"), dtype=dtype)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t), device.autocast():
            models.predict(latents, torch.zeros(n).long(), Encoding(parts=(states,), mask=torch.ones(n, 77, 1)))
        found.append(sum(size for size, _ in kept.values()))
        stage.after_pass()
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(("number", "weights"), [(1, "full"), (2, "full"), (3, "full"), (3, "lora")])
def test_what_trains_of_the_unet_is_counted(number, weights, dtype):
    """Recorded attention, LoRA and whole weights: per sample, and once for copies in half precision."""
    models, generator = small.models().to("cpu", dtype), torch.Generator().manual_seed(0)
    stages = recipe(run_stages="all", fine_tuning=weights).stages(models, CONCEPT, generator, Context())
    *_, stage = (next(stages) for _ in range(number))
    freeze_all_but(stage, models)
    one, three = unet_bytes(models, stage, dtype)
    counted = memory.activation_bytes(models, 8, False)
    assert counted / memory.MARGIN <= (three - one) / 2 <= memory.MARGIN * counted
    copies = memory.copied_bytes(models)
    assert copies == (2 * memory.trained_values(stage) if dtype != torch.float32 and number > 1 else 0)
    stages.close()


def test_adapters_of_the_unet_are_counted_before_a_prompt_is_encoded():
    """For one sample, and the same after a pass of three."""
    models = small.models()
    stage, _ = stage_of(models, "2026++")
    assert models.subject.mask is None
    counted = memory.activation_bytes(models, 8, False)
    one, three = unet_bytes(models, stage, torch.float32)
    assert counted / memory.MARGIN <= (three - one) / 2 <= memory.MARGIN * counted
    assert memory.activation_bytes(models, 8, False) == counted
