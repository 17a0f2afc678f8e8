"""Monitors over the loop: equal to their formulas, blind to nothing, and without any effect until they fire.

Small random models on the CPU. The ratio is compared with numpy, the loss on the fixed batch with the definition
written out, what is learned with a run that nobody watched.
"""

import dataclasses
import functools
import json

import numpy as np
import pytest
import torch

from personalize.tests.support import monitored, small
from personalize.tests.trainers.runs.test_resume import Killed, TwoStages, learned
from personalize.trainers.data.concept import Concept
from personalize.trainers.recipes.attndreambooth import AttnDreamBooth
from personalize.trainers.recipes.custom_diffusion import CustomDiffusion
from personalize.trainers.recipes.textboost import TextBoost
from personalize.trainers.recipes.textual_inversion import TextualInversion
from personalize.trainers.runs import train as training
from personalize.trainers.runs.folder import RunFolder
from personalize.trainers.runs.run import Run
from personalize.trainers.stopping.dvar import DVAR, PRESETS, FixedBatch, variance_ratio
from personalize.trainers.stopping.monitor import FixedSteps, borrowed
from personalize.trainers.training.memory import MemoryPlan

FAST = TextBoost(steps=7, batch_size=4, views=8, knowledge_weight=0.0)
WATCHING = DVAR(window=3, threshold=0.0, batch_size=3, stop_training=False)


def train(folder, stopper=(), recipe=FAST, *, models=None, stop_after=None, on_step=None, **options):
    def step(report):
        if on_step:
            on_step(report)
        if stop_after and len((folder / "steps.jsonl").read_text().splitlines()) == stop_after:
            raise Killed

    picture = torch.rand(3, 48, 32, generator=torch.Generator().manual_seed(5))
    concept = Concept(images=(picture, picture.flip(1)), resolution=32)
    run = Run(concept=concept, recipe=recipe, stopper=tuple(stopper))
    callbacks = training.Callbacks(on_step=step, **options.pop("callbacks", {}))
    options = {"checkpoint_every": 2, "callbacks": callbacks} | options
    return training.train(run, models or small.models(), folder, **options)


def weights(folder):
    return learned(folder)[0]


def stage_context(recipe=FAST):
    picture = torch.rand(3, 48, 32, generator=torch.Generator().manual_seed(5))
    return monitored.stage_context(recipe, Concept(images=(picture,), resolution=32))


# -- the ratio


def test_the_ratio_is_that_of_population_variances():
    values = [0.9, 0.4, 0.35, 0.2, 0.25]
    last, everything = values[-3:], values
    mean = [sum(v) / len(v) for v in (last, everything)]
    variances = [sum((x - m) ** 2 for x in v) / len(v) for v, m in zip((last, everything), mean, strict=True)]
    assert variance_ratio(values, 3) == pytest.approx(variances[0] / variances[1], rel=1e-12)
    assert variance_ratio(values, 6) == 1.0  # not enough of them yet
    assert variance_ratio(values, 5) == 1.0  # the window is all there is
    assert variance_ratio([0.5] * 4, 2) == 1.0  # nothing has changed: nothing has settled


@pytest.mark.parametrize(("every", "window"), [(1, 4), (2, 6)])
def test_the_log_holds_what_numpy_says(tmp_path, every, window):
    result = train(tmp_path / "run", [dataclasses.replace(WATCHING, window=window, every=every)])
    first = result.history[0]["start"]["DVAR"]
    looks = [first, *(e["measures"]["DVAR"] for e in result.history if "measures" in e)]
    assert [e["stage_step"] for e in result.history if "measures" in e] == [n for n in range(1, 8) if n % every == 0]
    values = [look["fixed_loss"] for look in looks]
    assert len(set(values)) == len(values)  # the loss moves
    count = window // every
    for n, look in enumerate(looks, 1):
        expected = np.var(values[n - count : n]) / np.var(values[:n]) if n >= count else 1.0
        assert look["ratio"] == pytest.approx(expected, rel=1e-12)
        assert look["smoothed"] == pytest.approx(np.mean(values[max(0, n - 10) : n]), rel=1e-12)


# -- the loss on the fixed batch


def test_the_loss_is_the_mean_squared_error_on_one_batch():
    """Written out: seeded noise and timesteps, one batch as the stage learns from, its own sample of the latents."""
    look = FixedBatch(dataclasses.replace(WATCHING, accumulation=2), seen := stage_context())
    with torch.no_grad():
        value = look(0)
        batch, models = look._batch(0), seen.models
        noise = torch.randn(3, 4, 4, 4, generator=torch.Generator().manual_seed(look._seed("noise", 0)))
        order = torch.randperm(1000, generator=torch.Generator().manual_seed(look._seed("timesteps", 0)))
        errors = []
        for t in (order[:3], order[3:6]):
            alphas = models.alphas_cumprod.double()[t][:, None, None, None]
            noisy = (alphas.sqrt() * batch.latents + (1 - alphas).sqrt() * noise).float()
            states = models.text_encoders[0](batch.input_ids[:, 0])[0]
            output = models.unet(noisy, t, encoder_hidden_states=states).sample
            errors.append(((output - noise) ** 2).mean())
    assert value == pytest.approx([float(error) for error in errors], rel=1e-5)
    assert set(order[:3].tolist()).isdisjoint(order[3:6].tolist())


@pytest.mark.parametrize("views", [0, 5])
def test_the_fixed_batch_is_the_first_images_and_templates_in_order(views):
    """As an evaluation loader of the authors' code without shuffling gives them; whatever the training draws."""
    images = tuple(torch.full((3, 32, 32), gray) for gray in (0.0, 0.5, 1.0))
    seen = monitored.stage_context(TextualInversion(views=views), Concept(images=images, resolution=32))
    fixed = FixedBatch(DVAR(), seen).fixed
    assert [round(mean.mean().item()) for mean in fixed.posterior[:, :4]] == [-2, 0, 2, -2]
    templates = ("a photo of a {}", "a rendering of a {}", "a cropped photo of the {}", "the photo of a {}")
    prompts = [template.replace("{}", "<concept>") for template in templates]
    assert torch.equal(fixed.input_ids, seen.models.tokenize(prompts))


def test_the_fixed_batch_has_one_shape_and_an_images_caption():
    """In aspect-ratio buckets the first image's; a caption takes the template's place, the other templates follow."""
    images = torch.rand(3, 32, 64), torch.rand(3, 64, 32), torch.rand(3, 32, 64)
    concept = Concept(images=images, resolution=64, crop="bucket", captions=("", "{} at night", "{} in snow"))
    seen = monitored.stage_context(TextualInversion(views=3), concept)
    fixed = FixedBatch(DVAR(), seen).fixed
    height, width = (side // 8 for side in concept.sizes(64)[0])
    assert height < width and fixed.latents.shape == (4, 4, height, width)
    prompts = ["a photo of a <concept>", "<concept> in snow", "a rendering of a <concept>", "<concept> in snow"]
    assert torch.equal(fixed.input_ids, seen.models.tokenize(prompts))


def test_on_custom_diffusion_the_loss_is_the_plain_mean_squared_error():
    """Masks of where a view shows the subject count in its training alone, as in the authors' code."""
    concept = Concept(images=(torch.rand(3, 32, 32),), resolution=32)
    seen = monitored.stage_context(CustomDiffusion(views=4, prior_weight=0.0), concept)
    look = FixedBatch(DVAR(batch_size=8), seen)
    (inputs,) = look._inputs(0, 0, 1000)
    assert seen.stage.first(8).masks.min() == 0
    with torch.no_grad():
        prediction = look.objective.predict(inputs.batch, inputs.noise, inputs.timesteps)
        assert look(0) == pytest.approx([(prediction.model_pred - inputs.noise).square().mean().item()], rel=1e-5)


def test_latents_are_drawn_from_the_posterior_of_the_batch():
    seen = stage_context()
    batch = FixedBatch(WATCHING, seen).fixed
    mean, deviation = batch.posterior.chunk(2, dim=1)
    sampled = FixedBatch(WATCHING, seen)._batch(0).latents
    assert (sampled - mean).abs().max() > 0
    assert torch.allclose((sampled - mean) / deviation, ((sampled - mean) / 0.01), atol=1e-3)
    plain = FixedBatch(dataclasses.replace(WATCHING, mean_latent=True), seen)._batch(0).latents
    assert torch.equal(plain, mean)


PART_OF = {
    "images": lambda look, step: look._batch(step).posterior,
    "latents": lambda look, step: look._batch(step).latents - look._batch(step).posterior[:, :4],
    "noise": lambda look, step: look._drawn("noise", step, lambda g: torch.randn(5, generator=g)),
    "captions": lambda look, step: look._batch(step).input_ids,
    "timesteps": lambda look, step: look._timesteps(step, 0, 1000, 3)[0],
}


@pytest.mark.parametrize("part", PART_OF)
def test_each_digit_draws_its_part_again_and_no_other(part):
    place = list(PART_OF).index(part)
    code = "".join("0" if i == place else "1" for i in range(5))
    recipe = dataclasses.replace(FAST, views=64)
    look = FixedBatch(dataclasses.replace(WATCHING, fixed_parts=code, batch_size=8), stage_context(recipe))
    for name, read in PART_OF.items():
        same = torch.allclose(read(look, 1).float(), read(look, 2).float(), atol=1e-6)
        assert same == (name != part), name


def test_without_noise_there_is_nothing_to_predict():
    """With epsilon the target is the noise itself: the loss is the mean square of what the model says."""
    look = FixedBatch(dataclasses.replace(WATCHING, zero_noise=True, mean_latent=True), seen := stage_context())
    with torch.no_grad():
        batch, (t,) = look._batch(0), look._timesteps(0, 0, 1000, 3)
        noisy = seen.models.alphas_cumprod[t][:, None, None, None].sqrt() * batch.latents
        output = seen.models.unet(
            noisy, t, encoder_hidden_states=seen.models.text_encoders[0](batch.input_ids[:, 0])[0]
        )
        assert look(0) == pytest.approx([float((output.sample**2).mean())], rel=1e-5)


def test_intervals_are_thirds_of_the_schedule(tmp_path):
    look = FixedBatch(WATCHING, stage_context())
    for low, high in ((0, 333), (333, 666), (666, 999)):
        (chunk,) = look._timesteps(0, low, high, 3)
        assert low <= chunk.min() and chunk.max() < high
    result = train(tmp_path / "run", [dataclasses.replace(WATCHING, intervals=True)])
    names = [set(entry["measures"]["DVAR"]) for entry in result.history]
    assert all({"begin", "middle", "end"} <= each for each in names)
    late = result.history[-1]["measures"]["DVAR"]
    assert len({late["begin"], late["middle"], late["end"], late["fixed_loss"]}) == 4


def test_parts_in_turn_are_the_newest_of_each(tmp_path):
    """Beside a monitor that looks at all parts each time: before the first step they agree, then one part is new."""
    whole = dataclasses.replace(WATCHING, accumulation=3)
    result = train(tmp_path / "run", [whole, dataclasses.replace(whole, rotate_timesteps=True)])
    look = FixedBatch(whole, stage_context())
    assert look(0)[1:2] == look(0, only=1)
    start = result.history[0]["start"]
    assert start["DVAR 2"]["fixed_loss"] == start["DVAR"]["fixed_loss"]
    parts = list(start["DVAR 2"]["parts"])
    assert len(parts) == 3
    for n, entry in enumerate(result.history):
        (new,) = entry["measures"]["DVAR 2"]["parts"]
        parts[n % 3] = new
        assert entry["measures"]["DVAR 2"]["fixed_loss"] == pytest.approx(sum(parts) / 3, rel=1e-12)
    every = [sum(entry["measures"][name]["seconds"] for entry in result.history) for name in ("DVAR", "DVAR 2")]
    assert every[1] < every[0]


def test_a_batch_aside_leaves_the_others_alone():
    recipe = dataclasses.replace(FAST, knowledge_weight=0.1)
    one, other = stage_context(recipe), stage_context(recipe)
    aside = [one.batch(size, seed) for size, seed in ((3, 1), (11, 1), (3, 2))]
    assert [len(batch) for batch in aside] == [3, 11, 3]
    assert torch.equal(aside[0].input_ids, aside[1].input_ids[:3])
    assert not torch.equal(aside[0].latents, aside[2].latents)
    assert aside[0].preservation_ids is None
    first, second = next(one.stage.batches), next(other.stage.batches)
    assert torch.equal(first.latents, second.latents) and torch.equal(first.preservation_ids, second.preservation_ids)


def test_a_borrowed_generator_comes_back_even_after_an_error():
    generator = torch.Generator().manual_seed(3)
    before = generator.get_state()
    with pytest.raises(Killed), borrowed(generator, 7):
        assert torch.equal(
            torch.rand(4, generator=generator), torch.rand(4, generator=torch.Generator().manual_seed(7))
        )
        raise Killed
    assert torch.equal(generator.get_state(), before)


# -- no effect until one fires


THREE = AttnDreamBooth(steps_1=3, steps_2=3, steps_3=3, batch_size_1=2, batch_size_2=2, batch_size_3=2, views=8)


@pytest.mark.parametrize("recipe", [FAST, dataclasses.replace(FAST, views=0), THREE], ids=["pool", "fresh", "stages"])
def test_a_watched_run_learns_the_same_bits(tmp_path, recipe):
    train(tmp_path / "alone", recipe=recipe)
    stopper = [
        WATCHING,
        dataclasses.replace(WATCHING, fixed_parts="00000", every=2, intervals=True),
        FixedSteps(steps=2, stop_training=False),
    ]
    watched = train(tmp_path / "watched", stopper, recipe)
    assert weights(tmp_path / "watched") == weights(tmp_path / "alone")
    assert "DVAR 2" in watched.history[1]["measures"] and watched.stop_reason.startswith("all")
    assert Run(concept=watched_concept(), recipe=recipe).settings()["stopper"] == []


def watched_concept():
    return Concept(images=(torch.rand(3, 32, 32),), resolution=32)


def test_dvar_stops_where_its_ratio_falls_below(tmp_path):
    watched = train(tmp_path / "watched", [WATCHING])
    ratios = [entry["measures"]["DVAR"]["ratio"] for entry in watched.history]
    falls = next(n for n in range(3, 7) if ratios[n - 1] < max(ratios[1 : n - 1]))
    eps = ratios[falls - 1] * (1 + 1e-9)
    fires = next(n for n, ratio in enumerate(ratios, 1) if ratio < eps)
    result = train(tmp_path / "run", [dataclasses.replace(WATCHING, threshold=eps, stop_training=True)])
    assert len(result.history) == fires and result.complete
    assert f"after step {fires}" in result.stop_reason and "DVAR" in result.stop_reason
    assert [(s["monitor"], s["stage_step"], s["acted"]) for s in result.stops] == [("DVAR", fires, True)]
    only = train(tmp_path / "short", [FixedSteps(steps=fires)])
    assert weights(tmp_path / "run") == weights(tmp_path / "short")
    assert len(only.history) == fires
    late = train(tmp_path / "late", [dataclasses.replace(WATCHING, threshold=100.0, stop_training=True, min_steps=5)])
    assert len(late.history) == 5
    early = train(tmp_path / "early", [dataclasses.replace(WATCHING, threshold=0.0, stop_training=True, max_steps=2)])
    assert len(early.history) == 2 and "2 steps at most" in early.stop_reason


def test_what_only_records_says_where_it_would_have_stopped(tmp_path):
    result = train(
        tmp_path / "run",
        [dataclasses.replace(WATCHING, threshold=100.0, stop_training=False, min_steps=3), FixedSteps(steps=5)],
    )
    stops = [(s["monitor"], s["stage_step"], s["acted"]) for s in result.stops]
    assert stops == [("DVAR", 3, False), ("Fixed Steps", 5, True)]
    assert len(result.history) == 5


def test_a_monitor_of_one_stage_leaves_the_others_alone(tmp_path):
    result = train(tmp_path / "run", [FixedSteps(steps=1, stage="2")], THREE)
    counts = {f"attndreambooth {n}": sum(e["stage"].endswith(str(n)) for e in result.history) for n in (1, 2, 3)}
    assert list(counts.values()) == [3, 1, 3]
    assert result.stops[0]["stage"] == "attndreambooth 2"


def test_finished_by_hand_is_complete_and_later_stages_go_on(tmp_path):
    asked = []
    finish = {"finish": lambda: asked.append(1) or len(asked) == 2}
    result = train(tmp_path / "run", recipe=THREE, callbacks=finish)
    assert [e["stage"][-1] for e in result.history] == list("11222333")
    assert result.complete and result.stop_reason == "attndreambooth 1 ended after step 2: finished by hand"
    assert result.stops == [
        {
            "stage": "attndreambooth 1",
            "step": 2,
            "stage_step": 2,
            "monitor": "you",
            "reason": "finished by hand",
            "acted": True,
        }
    ]


def test_every_line_of_the_log_is_told(tmp_path):
    told = []
    result = train(tmp_path / "run", [WATCHING], on_step=lambda report: told.append(report.entry()))
    lines = [json.loads(line) for line in (tmp_path / "run" / "steps.jsonl").read_text().splitlines()]
    assert told == lines == result.history


# -- kill and resume


ACTING = (
    dataclasses.replace(WATCHING, threshold=1.1, min_steps=2, keep="best"),
    FixedSteps(steps=6, stage="all"),
)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """`undisturbed(recipe)`: the result of a run with those, and its weights."""

    @functools.cache
    def of(recipe):
        folder = tmp_path_factory.mktemp("whole") / "run"
        return train(folder, ACTING, recipe), weights(folder)

    return of


@pytest.mark.parametrize("stop_after", [1, 2, 3, 5])
@pytest.mark.parametrize("recipe", [FAST, TwoStages(**vars(FAST))], ids=["one", "two"])
def test_state_survives_a_kill(undisturbed, tmp_path, monkeypatch, recipe, stop_after):
    """With two monitors, one of which acts, and the best state kept: the same log, stops and bits."""
    whole, weights_of_whole = undisturbed(recipe)
    for how in ("cancelled", "killed"):
        if how == "killed":
            monkeypatch.setattr(training.Trainer, "_break_off", lambda self, stages: None)
        folder = tmp_path / how
        with pytest.raises(Killed):
            train(folder, ACTING, recipe, stop_after=stop_after)
        result = train(folder, ACTING, recipe)
        assert weights(folder) == weights_of_whole
        assert timeless(result.history) == timeless(whole.history)
        assert result.stops == whole.stops and result.stop_reason == whole.stop_reason


def timeless(history):
    def without(measures):
        return {name: {k: v for k, v in m.items() if k != "seconds"} for name, m in measures.items()}

    kept = [{k: v for k, v in entry.items() if k != "seconds"} for entry in history]
    return [{k: without(v) if k in ("measures", "start") else v for k, v in entry.items()} for entry in kept]


def test_a_run_killed_after_it_fired_trains_no_further(tmp_path, monkeypatch):
    """The checkpoint of the very step at which it fired is there, its end is not."""
    stopper, folder = [FixedSteps(steps=4)], tmp_path / "run"
    with pytest.raises(Killed):
        monkeypatch.setattr(training.Trainer, "_finish", lambda *args, **kwargs: (_ for _ in ()).throw(Killed))
        train(folder, stopper)
    monkeypatch.undo()
    steps = []
    result = train(folder, stopper, on_step=lambda report: steps.append(report.step))
    assert not steps and len(result.history) == 4
    train(tmp_path / "whole", stopper)
    assert weights(folder) == weights(tmp_path / "whole")


# -- the best state


def test_the_best_state_is_returned_instead_of_the_last(tmp_path):
    """With a rate so high that the loss rises in the end: what comes back is a run of just as many steps."""
    recipe = dataclasses.replace(FAST, embedding_learning_rate=0.3, lora_learning_rate=0.3, clamp_norms=False)
    stopper = [dataclasses.replace(WATCHING, keep="best")]
    result = train(tmp_path / "run", stopper, recipe)
    losses = [entry["measures"]["DVAR"]["smoothed"] for entry in result.history]
    best = 1 + losses.index(min(losses))
    assert best < 7 and len(result.history) == 7
    assert min(losses) < 0.998 * min(losses[: best - 1] + losses[best:]), "rounding must not decide"
    assert f"the state after step {best} is kept, the best by DVAR" in result.stop_reason
    train(tmp_path / "best", [FixedSteps(steps=best)], recipe)
    assert weights(tmp_path / "run") == weights(tmp_path / "best")
    assert RunFolder(tmp_path / "run").result().stops == result.stops
    assert not Run(concept=watched_concept(), recipe=recipe, stopper=tuple(stopper)).lineage("x")


def test_memory_that_runs_out_takes_the_monitors_back_too(tmp_path, monkeypatch):
    stopper = [dataclasses.replace(WATCHING, keep="best")]
    whole = train(tmp_path / "whole", stopper, memory_plan=MemoryPlan(micro_batch_size=2))
    fail = [True]

    def on_step(report):
        if report.step == 5 and fail.pop() if fail else False:
            raise MemoryError

    result = train(tmp_path / "run", stopper, memory_plan=MemoryPlan(micro_batch_size=2), on_step=on_step)
    assert [e["step"] for e in result.history] == [e["step"] for e in whole.history]


# -- words


def test_the_papers_presets_evaluate_after_every_step():
    """Window and threshold of the paper's table; ours beside them evaluate after every eighth step."""
    wanted = {"Textual Inversion": (310, 0.15), "DreamBooth-LoRA": (440, 0.4), "Custom Diffusion": (180, 0.15)}
    for method, numbers in wanted.items():
        ours, paper = PRESETS[method], PRESETS[f"{method}, paper"]
        assert (paper.window, paper.threshold) == (ours.window, ours.threshold) == numbers
        assert (paper.every, ours.every, paper.batch_size) == (1, 8, 4)
        assert (paper.evaluations, ours.evaluations) == (numbers[0], numbers[0] // 8)


def test_a_window_that_cannot_fit_says_what_to_set(tmp_path):
    said = []
    train(tmp_path / "run", [PRESETS["Textual Inversion"]], callbacks={"on_warning": said.append})
    sentence = next(s for s in said if "DVAR" in s)
    assert "310 steps" in sentence and "7 steps of textboost" in sentence and "set window to about 2" in sentence
    said.clear()
    train(tmp_path / "other", [WATCHING], callbacks={"on_warning": said.append})
    assert not said


@pytest.mark.parametrize("code", ["1111", "111111", "11112", "abcde", ""])
def test_a_code_of_other_digits_is_refused(code):
    with pytest.raises(ValueError, match="five digits"):
        DVAR(fixed_parts=code)
