"""What a run learned, put back into fresh models: do they draw exactly what the trained ones draw? Every method."""

import dataclasses

import pytest
import torch

from personalize.tests.support import small
from personalize.trainers.data.concept import Concept
from personalize.trainers.device import SingleDevice
from personalize.trainers.models import sampler
from personalize.trainers.models.families import SD1, SDXL
from personalize.trainers.recipes import attndreambooth, custom_diffusion, dreambooth_lora, t_lora, textual_inversion
from personalize.trainers.recipes.textboost import TextBoost
from personalize.trainers.recipes.textboost_2026 import TextBoost2026
from personalize.trainers.runs import restore, saved_images, train
from personalize.trainers.runs.folder import RunFolder
from personalize.trainers.runs.run import Run

RATES = {f"learning_rate_{stage}": 1e-2 for stage in (1, 2, 3)}
STAGES = {f"{name}_{stage}": 2 for name in ("steps", "batch_size") for stage in (1, 2, 3)}
STAGED = dataclasses.replace(attndreambooth.FAST, views=2, **RATES, **STAGES)
SHORT = {"steps": 2, "views": 2, "learning_rate": 1e-2}
FAST = {"steps": 2, "views": 2, "batch_size": 2, "embedding_learning_rate": 1e-2}
TEXT = {**FAST, "lora_learning_rate": 1e-2, "captions": small.CAPTIONS}
ADAPTED = {**FAST, "adapter_learning_rate": 1e-2}
RECIPES = {
    "TextBoost": TextBoost(**TEXT, lora_rank=3, lora_alpha=1.3),
    "TextBoost U-Net, style": TextBoost(**TEXT, unet_lora_rank=2, unet_lora_learning_rate=1e-2, mixing="style"),
    "TextBoost 2026 CPA": TextBoost2026(**ADAPTED),
    "TextBoost 2026++": TextBoost2026(**ADAPTED, cross_attention=True, adapter_rank=2),
    "AttnDreamBooth": STAGED,
    "AttnDreamBooth LoRA": dataclasses.replace(STAGED, fine_tuning="lora"),
    "Textual Inversion": dataclasses.replace(textual_inversion.FULL, **SHORT),
    "DreamBooth-LoRA": dataclasses.replace(dreambooth_lora.FULL, **SHORT),
    "T-LoRA": t_lora.TLoRA(**SHORT, lora_rank=8, min_rank=2),
    "Custom Diffusion": dataclasses.replace(custom_diffusion.FULL, **SHORT, class_images=2, class_image_steps=2),
}
CASES = [
    *((name, SD1, torch.float32) for name in RECIPES),
    ("TextBoost", SDXL, torch.float32),
    ("TextBoost 2026++", SDXL, torch.float32),
    ("TextBoost U-Net, style", SD1, torch.bfloat16),
    ("AttnDreamBooth", SD1, torch.bfloat16),
]


def drawn(models, run):
    prompts = [f"a photo of {run.recipe.subject(run.concept)} in the snow", "a photo of a dog"]
    with SingleDevice(device=models.device, dtype=run.dtype).autocast():
        return sampler.sample(models, prompts, [0, 1], size=(32, 32), steps=3)


def trained(folder, name, family=SD1, dtype=torch.float32):
    """The run, the models right after the training, and what the run's folder holds."""
    pictures = torch.rand(2, 3, 40, 32, generator=torch.Generator().manual_seed(0))
    run = Run(concept=Concept(images=tuple(pictures), resolution=32), recipe=RECIPES[name], dtype=dtype)
    models = small.models(family=family)
    train.train(run, models, folder)
    return run, models, RunFolder(folder).result()


@pytest.mark.parametrize(("name", "family", "dtype"), CASES, ids=[f"{n}, {f.name}, {d}" for n, f, d in CASES])
def test_the_images_are_those_of_the_trained_models(tmp_path, name, family, dtype):
    run, models, result = trained(tmp_path, name, family, dtype)
    fresh = small.models(family=family).to("cpu", dtype)
    before = drawn(fresh, run)
    restore.put(result, fresh)
    pictures, theirs = drawn(fresh, run), drawn(models, run)
    assert (pictures - before).abs().max() > 1e-3
    if models.base_weights:  # files keep the difference in half precision
        assert dtype != torch.float32 or (pictures - theirs).abs().max() < 1 / 255
        now = dict(models.unet.named_parameters())
        for weight, base in models.base_weights.items():
            now[weight].data = base.float() + (now[weight].data - base.float()).half().float()
        theirs = drawn(models, run)
    assert torch.equal(pictures, theirs)


def test_another_model_gets_one_sentence(tmp_path):
    _, _, result = trained(tmp_path, "TextBoost")
    with pytest.raises(ValueError, match="does not fit this model"):
        restore.put(result, small.models(family=SDXL))
    more = dataclasses.replace(result, lora={**result.lora, "lora_unet_nothing.diff": torch.ones(1)})
    with pytest.raises(ValueError, match="does not fit this model"):
        restore.put(more, small.models())


def test_an_image_that_is_selected_twice_is_saved_twice(tmp_path):
    """As by the selection "1, 1"; of numbers between those of a PNG."""
    image = torch.full((3, 32, 32), 0.123456)
    saved_images.write(Concept(images=(image, image), resolution=32), tmp_path)
    assert all(torch.equal(image, back) for back in saved_images.read(tmp_path)["images"])
