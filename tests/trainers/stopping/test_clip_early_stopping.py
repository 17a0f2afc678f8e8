"""CLIP early stopping: the decision against a table made by hand, the score against open_clip on the same images."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from personalize.demo import evaluators
from personalize.tests.support import monitored, small, world_clip
from personalize.trainers.data.concept import Concept
from personalize.trainers.data.context import Context
from personalize.trainers.data.templates import IMAGENET
from personalize.trainers.digest import choose
from personalize.trainers.images import to_pil
from personalize.trainers.models import sampler
from personalize.trainers.recipes.attndreambooth import AttnDreamBooth
from personalize.trainers.recipes.custom_diffusion import CustomDiffusion
from personalize.trainers.recipes.dreambooth_lora import DreamBoothLoRA
from personalize.trainers.recipes.textboost import TextBoost
from personalize.trainers.recipes.textboost_2026 import TextBoost2026
from personalize.trainers.recipes.textual_inversion import TextualInversion
from personalize.trainers.runs import train as training
from personalize.trainers.runs.folder import RunFolder
from personalize.trainers.runs.run import Run
from personalize.trainers.stopping.clip_early_stopping import (
    PRESETS,
    ClipEarlyStopping,
    ImageScore,
    fired_at,
    progress,
)

open_clip = pytest.importorskip("open_clip")
FAST = TextBoost(steps=6, batch_size=4, views=8, knowledge_weight=0.0, fixed_outputs=False)
QUICK = ClipEarlyStopping(
    every=2,
    images=3,
    sampler_steps=2,
    clip_model=world_clip.CHOICE.clip_model,
    clip_weights=world_clip.CHOICE.clip_weights,
)


def concept():
    return Concept(images=world_clip.tensors(world_clip.pictures()), resolution=32)


def stage_context(shelf):
    return monitored.stage_context(FAST, concept(), context=Context(extractors=shelf))


def train(shelf, folder, *stopper, recipe=FAST, **options):
    run = Run(concept=concept(), recipe=recipe, stopper=stopper)
    return training.train(run, small.models(), folder, extractors=shelf, **options)


# Scores, patience, eps -> best after the last, checks without an improvement, the check that stops (from 1).
TABLE = [
    ([0.50], 0, 0.02, 0.50, 0, None),
    ([0.50, 0.50], 0, 0.02, 0.50, 1, 2),  # more than no check without an improvement
    ([0.50, 0.53], 0, 0.02, 0.53, 0, None),
    ([0.50, 0.52], 0, 0.02, 0.50, 1, 2),  # by eps is not by more than eps
    ([0.50, 0.51, 0.515, 0.53], 2, 0.02, 0.53, 0, None),  # the best moves with improvements only: slow progress counts
    ([0.50, 0.51, 0.515, 0.519], 2, 0.02, 0.50, 3, 4),
    ([0.50, 0.40, 0.60, 0.61, 0.30, 0.615], 2, 0.02, 0.60, 3, 6),  # an improvement starts the count again
    ([0.50, 0.40, 0.60, 0.61, 0.30, 0.625], 2, 0.02, 0.625, 0, None),
    ([0.50, 0.50, 0.50, 0.90, 0.90, 0.90], 1, 0.02, 0.90, 2, 3),  # what comes after does not undo it
    ([-0.10, -0.20, -0.05, -0.05, -0.05], 1, 0.04, -0.05, 2, 5),
    ([0.5, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5], 6, 0.02, 0.5, 6, None),
    ([0.5, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5], 6, 0.02, 0.5, 7, 8),  # the authors' settings at their earliest
    ([0.5, 0.6, 0.7], 0, 0.0, 0.7, 0, None),
    ([0.5, 0.5], 0, 0.0, 0.5, 1, 2),
]


@pytest.mark.parametrize(("scores", "patience", "eps", "best", "idle", "fires"), TABLE)
def test_the_decision(scores, patience, eps, best, idle, fires):
    assert progress(scores, eps) == (best, idle)
    assert fired_at(scores, patience, eps) == fires


@torch.no_grad()
def test_the_score_is_open_clips_on_the_same_images(shelf, folder):
    """Images generated from the method's own templates, image i with reference i, references in turn."""
    seen = stage_context(shelf)
    score = ImageScore(QUICK, seen)()
    drawn, templates = torch.Generator().manual_seed(QUICK.seed), seen.stage.templates
    prompts = [choose(templates, drawn).replace("{}", "<concept>") for _ in range(3)]
    ids = seen.models.tokenize(prompts)
    pictures = sampler.sample_ids(seen.models, ids, [37, 38, 39], size=(32, 32), steps=2, guidance=7.5, batch_size=3)
    model, _, preprocess = open_clip.create_model_and_transforms(
        evaluators.CLIP_NAME, pretrained=str(folder / world_clip.FILE)
    )

    def feature(image):
        return model.eval().encode_image(preprocess(image)[None])[0].double()

    one, other = world_clip.pictures()
    pairs = zip(pictures, [one, other, one], strict=True)
    cosines = [F.cosine_similarity(feature(to_pil(p)), feature(r), dim=0) for p, r in pairs]
    assert score == pytest.approx(float(sum(cosines) / 3), abs=1e-5)
    assert max(cosines) - min(cosines) > 1e-3


@pytest.mark.parametrize(
    ("recipe", "count"),
    [
        (TextualInversion(views=2), 57),
        (DreamBoothLoRA(views=2), 57),
        (CustomDiffusion(views=2, prior_weight=0.0), 57),
        (TextBoost(views=16, with_class_word=True, augmentation_p=1.0, knowledge_weight=0.0), 27),
        (TextBoost2026(views=16, augmentation_p=1.0), 27),
        (AttnDreamBooth(views=2), 1),
    ],
    ids=["textual inversion", "dreambooth-lora", "custom diffusion", "textboost", "2026", "attndreambooth"],
)
def test_prompts_are_eight_draws_of_the_methods_templates_with_the_placeholder_alone(shelf, recipe, count):
    """As in DVAR's code: with no class word and no augmentation named, whatever the training batches say."""
    seen = monitored.stage_context(recipe, concept(), context=Context(extractors=shelf))
    score = ImageScore(replace(QUICK, images=8), seen)
    templates = [template.replace("{}", "<concept>") for template in IMAGENET[:count]]
    assert len(templates) == count and len(score.prompts) == 8
    assert set(score.prompts) <= set(templates) and len(set(score.prompts)) > min(count, 5) - 1


def test_sampled_ids_are_sampled_prompts():
    made = small.models()
    options = {"size": (32, 32), "steps": 2, "guidance": 3.0, "batch_size": 2}
    ids = made.tokenize(["a dog", "a cat", ""])
    prompts = sampler.sample(made, ["a dog", "a cat", ""], [1, 2, 3], **options)
    assert torch.equal(sampler.sample_ids(made, ids, [1, 2, 3], **options), prompts)
    with pytest.raises(ValueError, match="3 prompts but 2 seeds"):
        sampler.sample_ids(made, ids, [1, 2], **options)


def test_prompts_and_noise_are_the_same_each_time(shelf):
    seen, again = stage_context(shelf), stage_context(shelf)
    shelf.clear()
    before, everywhere = seen.generator.get_state(), torch.get_rng_state()
    score = ImageScore(QUICK, seen)
    values = [score(), score()]
    assert values[0] == values[1] == ImageScore(QUICK, again)()
    assert values[0] != ImageScore(replace(QUICK, seed=1), seen)()
    assert torch.equal(seen.generator.get_state(), before) and torch.equal(torch.get_rng_state(), everywhere)


def test_less_memory_less_at_once(shelf, monkeypatch):
    """A check never asks for more memory than there is: half the images, and so on."""
    score = ImageScore(replace(QUICK, images=8), stage_context(shelf))
    plenty, sizes, draw = score(), [], sampler.sample_ids

    def little_memory(*given, batch_size, **options):
        sizes.append(batch_size)
        if batch_size > 2:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return draw(*given, batch_size=batch_size, **options)

    monkeypatch.setattr(sampler, "sample_ids", little_memory)
    assert score() == pytest.approx(plenty, abs=1e-4) and sizes == [8, 4, 2]

    def none(*given, **options):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(sampler, "sample_ids", none)
    with pytest.raises(torch.cuda.OutOfMemoryError):
        score()

    def broken(*given, **options):
        sizes.append("broken")
        raise RuntimeError("another error")

    monkeypatch.setattr(sampler, "sample_ids", broken)
    with pytest.raises(RuntimeError, match="another"):
        score()
    assert sizes.count("broken") == 1


def test_a_run_stops_where_its_log_says(shelf, tmp_path):
    free = train(shelf, tmp_path / "free")
    noted = train(shelf, tmp_path / "noted", replace(QUICK, patience=0, min_delta=1.0, stop_training=False))
    acted = train(shelf, tmp_path / "acted", replace(QUICK, patience=0, min_delta=1.0))
    measures = [e["measures"]["CLIP Early Stopping"] for e in noted.history if "measures" in e]
    assert [e["stage_step"] for e in noted.history if "measures" in e] == [2, 4, 6]
    assert all(m.keys() == {"score", "best", "threshold", "idle", "seconds"} for m in measures)
    scores = [m["score"] for m in measures]
    assert [m["best"] for m in measures] == [scores[0]] * 3 and fired_at(scores, 0, 1.0) == 2
    assert [m["threshold"] - m["best"] for m in measures] == pytest.approx([1.0] * 3)
    for result, steps, acts in ((noted, 6, False), (acted, 4, True)):
        (stop,) = result.stops
        assert stop["stage_step"] == 4 and stop["monitor"] == "CLIP Early Stopping" and stop["acted"] is acts
        assert len(result.history) == steps and result.complete
        assert "no score above" in stop["reason"] and "in 1 evaluations" in stop["reason"]
    assert "CLIP Early Stopping, no score above" in acted.stop_reason
    # Whether it looks or not, the same is learned.
    assert [e["loss"] for e in noted.history] == [e["loss"] for e in free.history]
    assert all(torch.equal(noted.lora[name], free.lora[name]) for name in free.lora)
    assert all(torch.equal(a, b) for a, b in zip(noted.tokens["<concept>"], free.tokens["<concept>"], strict=True))


def test_limits_always_hold(shelf, tmp_path):
    early = replace(QUICK, patience=0, min_delta=1.0)
    late = train(shelf, tmp_path / "late", replace(early, min_steps=6))
    assert [stop["stage_step"] for stop in late.stops] == [6]
    capped = train(shelf, tmp_path / "capped", replace(early, max_steps=3))
    assert len(capped.history) == 3
    other = train(shelf, tmp_path / "other", replace(early, stage="2"))
    assert len(other.history) == 6 and not other.stops


class Killed(BaseException):
    pass


def test_a_killed_run_goes_on_as_if_it_had_not_been(shelf, tmp_path):
    stopper = replace(QUICK, patience=1, min_delta=1.0)

    def kill(report):
        if report.step == 3:
            raise Killed

    whole = train(shelf, tmp_path / "whole", stopper)
    with pytest.raises(Killed):
        train(shelf, tmp_path / "killed", stopper, callbacks=training.Callbacks(on_step=kill))
    assert len(RunFolder(tmp_path / "killed").history(3)) == 3
    resumed = train(shelf, tmp_path / "killed", stopper)

    def measured(result):
        measures = [e["measures"]["CLIP Early Stopping"] for e in result.history if "measures" in e]
        return [{name: value for name, value in m.items() if name != "seconds"} for m in measures]

    assert measured(resumed) == measured(whole) and len(measured(whole)) == 3
    strip = [{k: v for k, v in stop.items() if k != "seconds"} for stop in resumed.stops]
    assert strip == [{k: v for k, v in stop.items() if k != "seconds"} for stop in whole.stops]


def test_the_best_state_can_be_kept(shelf, tmp_path):
    """Which is the one with the highest score, wherever the training ended."""
    result = train(shelf, tmp_path / "best", replace(QUICK, keep="best"), recipe=replace(FAST, steps=8))
    scores = {e["stage_step"]: e["measures"]["CLIP Early Stopping"]["score"] for e in result.history if "measures" in e}
    best = max(scores, key=scores.get)
    there = train(shelf, tmp_path / "there", recipe=replace(FAST, steps=best))
    assert all(torch.equal(result.lora[name], there.lora[name]) for name in there.lora)


def test_settings_that_can_never_fire_are_said(shelf):
    stage = stage_context(shelf).stage
    stage.steps = 400
    assert "stops at step 400 at the earliest" in ClipEarlyStopping().warning(stage)
    assert "the 100 steps" in ClipEarlyStopping(max_steps=100).warning(stage)
    stage.steps = 401
    assert ClipEarlyStopping().warning(stage) == ""


def test_the_presets():
    """methods.md: patience, eps, guidance and sampler steps of the three methods; ours for short runs can fire."""
    found = {
        name: (each.patience, each.min_delta, each.guidance, each.sampler_steps, each.every, each.images, each.seed)
        for name, each in PRESETS.items()
    }
    assert found["Textual Inversion"] == (6, 0.02, 7.5, 50, 50, 8, 37)
    assert found["Custom Diffusion"] == (6, 0.02, 6.0, 50, 50, 8, 37)
    assert found["DreamBooth-LoRA"] == (3, 0.04, 6.0, 200, 50, 8, 37)
    for name, steps in (("TextBoost", 250), ("AttnDreamBooth", 200)):
        assert PRESETS[name].every * (PRESETS[name].patience + 2) < steps


def test_a_missing_clip_is_said_before_the_first_step(tmp_path, shelf):
    with pytest.raises(ValueError, match="There are no CLIP weights 'other.safetensors'"):
        train(shelf, tmp_path, replace(QUICK, clip_weights="other.safetensors"))
    assert not (tmp_path / "steps.jsonl").read_text()
