"""Pick by Score: the choice against tables made by hand, the scores against the metric models' own, the states against
shorter trainings.
"""

import dataclasses
import json
import re
from dataclasses import replace

import pytest
import torch

from personalize.tests.support import evaluating, monitored, small, world_clip
from personalize.trainers.data.concept import Concept
from personalize.trainers.data.context import Context
from personalize.trainers.images import to_pil
from personalize.trainers.metrics import metrics
from personalize.trainers.models import sampler
from personalize.trainers.recipes.attndreambooth import AttnDreamBooth
from personalize.trainers.recipes.textboost import TextBoost
from personalize.trainers.runs import replay
from personalize.trainers.runs import train as training
from personalize.trainers.runs.folder import RunFolder
from personalize.trainers.runs.pick import candidates, picked, preferred
from personalize.trainers.runs.run import Run, extractor_configs
from personalize.trainers.stopping.monitor import FixedSteps
from personalize.trainers.stopping.pick_by_score import CLIP_I, PickByScore, Scores

pytest.importorskip("open_clip")
FAST = TextBoost(steps=5, batch_size=2, views=4, knowledge_weight=0.0, fixed_outputs=False, lora_learning_rate=0.01)
PROMPTS = "a {} on the beach\na drawing of a {}"
METRIC_MODELS = {name: value for name, value in evaluating.WORLD.items() if name != "diversity"}
QUICK = PickByScore(every=2, prompts=PROMPTS, seeds=2, sampler_steps=2, guidance=3.0, **METRIC_MODELS)


@pytest.fixture(scope="module")
def shelf(tmp_path_factory):
    return evaluating.write(tmp_path_factory.mktemp("metric_models"))


def concept():
    return Concept(images=world_clip.tensors(world_clip.pictures()), resolution=64, class_word="dog")


def train(shelf, folder, *stopper, recipe=FAST, **options):
    run = Run(concept=concept(), recipe=recipe, stopper=stopper)
    return training.train(run, small.models(), folder, extractors=shelf, **options)


def same(one, other):
    """Whether two results learned the same, bit for bit."""
    ours, theirs = ({**each.lora, **each.learned()} for each in (one, other))
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


# -- the choice


def history(*rows, floors=(0.2, 0.1)):
    """A log of (step, identity, text), with steps between that nobody looked at."""
    start = {"Pick by Score": {"identity_floor": floors[0], "text_floor": floors[1], "seconds": 1.0}}
    entries = [{"step": 1, "stage": "s", "start": start}]
    for step, identity, text in rows:
        entries += [{"step": step, "measures": {"Pick by Score": {"identity": identity, "text": text}}}]
        entries += [{"step": step + 1, "measures": {"DVAR": {"ratio": 1.0}}}]
    return entries


def test_scores_go_from_the_floor_to_the_best():
    found = candidates(history((10, 0.4, 0.5), (20, 0.5, 0.4), (30, 0.6, 0.2)))
    assert [each.step for each in found] == [10, 20, 30]
    assert [each.scaled_identity for each in found] == pytest.approx([0.5, 0.75, 1.0])  # (identity - 0.2) / (0.6 - 0.2)
    assert [each.scaled_text for each in found] == pytest.approx([1.0, 0.75, 0.25])  # (text - 0.1) / (0.5 - 0.1)
    # (1 - s) identity + s text
    assert [each.score(0.25) for each in found] == pytest.approx([0.625, 0.75, 0.8125])
    assert [each.score(0.6) for each in found] == pytest.approx([0.8, 0.75, 0.55])


@pytest.mark.parametrize(("weight", "step"), [(0.0, 30), (0.25, 30), (0.45, 20), (0.5, 20), (0.6, 10), (1.0, 10)])
def test_the_preference_decides(weight, step):
    assert preferred(history((10, 0.4, 0.5), (20, 0.51, 0.41), (30, 0.6, 0.2)), weight).step == step


def test_what_is_never_above_its_floor_says_nothing():
    """Then the other score decides; and of equal states the one with the fewest steps is taken."""
    worse = history((10, 0.1, 0.3), (20, 0.15, 0.4))
    assert [each.scaled_identity for each in candidates(worse)] == [0.0, 0.0]
    assert preferred(worse, 0.5).step == 20 and preferred(worse, 0.0).step == 10


def test_the_floor_is_that_before_the_first_stage():
    log = history((10, 0.4, 0.5))
    log.append({"step": 12, "start": {"Pick by Score": {"identity_floor": 0.3, "text_floor": 0.3}}})
    log.append({"step": 20, "measures": {"Pick by Score": {"identity": 0.6, "text": 0.3}}})
    assert [each.scaled_identity for each in candidates(log)] == pytest.approx([0.5, 1.0])
    assert [each.scaled_text for each in candidates(log)] == pytest.approx([1.0, 0.5])


def test_a_log_without_scores_has_nothing_to_pick():
    assert preferred([], 0.5) is None and preferred(history(), 0.5) is None


# -- the scores


@torch.no_grad()
@pytest.mark.parametrize("identity", ["DINO", CLIP_I])
def test_the_scores_are_the_metric_models_own(shelf, identity):
    seen = monitored.stage_context(FAST, concept(), subject="<concept> dog", context=Context(extractors=shelf))
    look = Scores(replace(QUICK, identity=identity, first_seed=5), seen)
    measured, floors = look(), look.floors()

    clip, dino = (shelf.load(choice) for choice in QUICK.extractor_configs)
    references = [to_pil(image) for image in concept().images]

    def drawn(subject):
        lines = [line.replace("{}", subject) for line in PROMPTS.splitlines() for _ in range(2)]
        pixels = sampler.sample(seen.models, lines, [5, 6, 5, 6], size=(64, 64), steps=2, guidance=3.0)
        return [to_pil(picture) for picture in pixels]

    def likeness(pictures):
        return float((metrics.dino(dino, pictures, references) if identity == "DINO" else
                      metrics.clip_image(clip, pictures, references)).mean())  # fmt: skip

    texts = [line.replace("{}", "dog") for line in PROMPTS.splitlines()]
    pictures = drawn("<concept> dog")
    assert measured["identity"] == pytest.approx(likeness(pictures), abs=1e-6)
    by_text = metrics.clip_text(clip, pictures, [texts[0], texts[0], texts[1], texts[1]])
    assert measured["text"] == pytest.approx(float(by_text.mean()), abs=1e-6)
    assert floors["identity_floor"] == pytest.approx(likeness(drawn("dog")), abs=1e-6)
    both = [metrics.clip_text(clip, references, [text] * len(references)).mean() for text in texts]
    assert floors["text_floor"] == pytest.approx(float(sum(both) / len(both)), abs=1e-6)


# -- a run


def test_states_are_those_of_shorter_trainings(shelf, tmp_path):
    """Scored every second step and at the last; each state is that of a training which ended there."""
    result = train(shelf, tmp_path / "scored", QUICK)
    assert [each.step for each in candidates(result.history)] == [2, 4, 5]
    names = {each.name for each in (tmp_path / "scored" / "states").iterdir()}
    assert names == {"step_000002", "step_000004", "step_000005"}
    for step in (2, 4, 5):
        short = train(shelf, tmp_path / f"short{step}", FixedSteps(steps=step))
        kept = RunFolder(tmp_path / "scored").result(step=step)
        assert same(kept, short) and kept.picked == kept.steps == step
        header = json.loads(kept.metadata()["personalize"])
        assert header["steps"] == step and kept.metadata()["ss_steps"] == str(step)
    assert same(result, train(shelf, tmp_path / "free"))  # who looks changes nothing
    assert result.picked == 0 and result.steps == 5


def test_the_preferred_state_comes_back_without_a_training(shelf, tmp_path):
    result = train(shelf, tmp_path / "run", QUICK)
    for weight in (0.0, 0.5, 1.0):
        best = preferred(result.history, weight)
        found = picked(result, weight)
        assert found.picked == best.step and same(found, RunFolder(tmp_path / "run").result(step=best.step))
        assert found.stop_reason.startswith("all 5 steps done; of 3 scored states the one after step")
        assert f"identity {best.identity:.3f}, text {best.text:.3f}" in found.stop_reason
        assert found.history == result.history and found.complete
    free = train(shelf, tmp_path / "free")
    assert picked(free, 0.5) is free


def test_a_state_that_is_gone_is_said(shelf, tmp_path):
    result = train(shelf, tmp_path / "run", QUICK)
    step = preferred(result.history, 0.0).step
    (tmp_path / "run" / "states" / f"step_{step:06d}" / "lora.safetensors").write_bytes(b"cut")
    with pytest.raises(RuntimeError, match=f"The state after step {step} of run run cannot be read: choose another"):
        picked(result, 0.0)


def test_only_what_decides_what_is_learned_names_a_run():
    def digest(**changes):
        return Run(concept=concept(), recipe=FAST, stopper=(replace(QUICK, **changes),)).digest("model")

    assert digest(text_weight=0.9) == digest() == digest(clip_download=True) == digest(dino_download=True)
    assert len({digest(), digest(every=3), digest(prompts="a {}"), digest(clip_weights="x"), digest(first_seed=1)}) == 5
    run = Run(concept=concept(), recipe=FAST, stopper=(QUICK,))
    assert extractor_configs(FAST, [QUICK]) == [*QUICK.extractor_configs] and not run.lineage("model")
    assert replay.monitors(run.settings()["stopper"]) == (QUICK,)


class Killed(BaseException):
    pass


@pytest.mark.parametrize("at", [1, 2, 3, 4])
def test_a_killed_run_goes_on_as_if_it_had_not_been(shelf, tmp_path, at):
    def kill(report):
        if report.step == at:
            raise Killed

    def scores(result):
        return [dataclasses.astuple(each) for each in candidates(result.history)]

    whole = train(shelf, tmp_path / "whole", QUICK)
    with pytest.raises(Killed):
        train(shelf, tmp_path / "killed", QUICK, callbacks=training.Callbacks(on_step=kill))
    resumed = train(shelf, tmp_path / "killed", QUICK)
    assert scores(resumed) == scores(whole) and len(scores(whole)) == 3
    assert all(same(picked(resumed, weight), picked(whole, weight)) for weight in (0.0, 0.5, 1.0))


def test_a_full_disk_leaves_no_checkpoint_without_its_state(shelf, tmp_path, monkeypatch):
    def full(self, result, step):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "save_result", full)
        with pytest.raises(RuntimeError, match="cannot be written"):
            train(shelf, tmp_path / "run", QUICK, checkpoint_every=1)
    resumed = train(shelf, tmp_path / "run", QUICK)
    assert all(RunFolder(tmp_path / "run").result(step=each.step) for each in candidates(resumed.history))


def test_a_interrupted_run_has_what_was_scored_by_then(shelf, tmp_path):
    def kill(report):
        if report.step == 3:
            raise Killed

    with pytest.raises(Killed):
        train(shelf, tmp_path / "killed", QUICK, callbacks=training.Callbacks(on_step=kill))
    partial = RunFolder(tmp_path / "killed").result(partial=True)
    found = picked(partial, 0.5)
    assert found.picked == 2 and not found.complete and found.stop_reason.startswith("broken off after step 3; of 1")


def test_stages_are_scored_together(shelf, tmp_path):
    """Steps count over all stages."""
    sizes = {f"{name}_{stage}": 2 for name in ("steps", "batch_size") for stage in (1, 2, 3)}
    recipe = AttnDreamBooth(**sizes, views=4, fine_tuning="lora", lora_rank=2)
    result = train(shelf, tmp_path / "all", replace(QUICK, seeds=1), recipe=recipe)
    assert [each.step for each in candidates(result.history)] == [2, 4, 6]
    assert sum("start" in entry for entry in result.history) == 3
    word = RunFolder(tmp_path / "all").result(step=2)
    assert word.tokens and not word.lora and RunFolder(tmp_path / "all").result(step=6).lora
    last = train(shelf, tmp_path / "last", replace(QUICK, seeds=1, stage="3"), recipe=recipe)
    assert [each.step for each in candidates(last.history)] == [6]


def test_the_disk_that_the_states_need_is_said_before(shelf, tmp_path):
    def megabytes(*stopper):
        said = []

        def stop(sentence):
            said.append(sentence)
            if "of disk" in sentence:
                raise Killed

        recipe = replace(FAST, steps=4000)
        with pytest.raises(Killed):
            train(shelf, tmp_path / "run", *stopper, recipe=recipe, callbacks=training.Callbacks(on_notice=stop))
        return float(re.search(r"up to ([\d.]+) MB of disk", said[-1])[1])

    made = small.models()
    stage = next(replace(FAST, steps=4000).stages(made, concept(), torch.Generator().manual_seed(0), Context()))
    values = sum(parameter.numel() for parameter in stage.parameters())
    more = megabytes(replace(QUICK, every=3)) - megabytes()
    assert more == pytest.approx(1334 * 4 * values / 2**20, abs=0.2) and more > 10


def test_prompts_without_the_subject_are_refused():
    for prompts in ("", "\n", "a dog\na cat"):
        with pytest.raises(ValueError, match="The prompts to score have no place for the subject: write {}"):
            PickByScore(prompts=prompts)
    assert PickByScore(prompts="a {}\nnothing").extractor_configs
