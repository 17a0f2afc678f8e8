"""Learning rates: those of diffusers at every step, in every method, and after a kill as if there had been none?"""

import dataclasses
from dataclasses import dataclass, field

import pytest
import torch
from diffusers.optimization import get_scheduler

from personalize.tests.support import small
from personalize.tests.trainers.runs.test_resume import FAST, Killed, learned
from personalize.tests.trainers.runs.test_resume import train as train_textboost
from personalize.trainers.data.concept import Concept
from personalize.trainers.device import SingleDevice
from personalize.trainers.recipes import METHODS
from personalize.trainers.runs import train as training
from personalize.trainers.runs.run import Run
from personalize.trainers.training.optimizers import SCHEDULES, Optimization

THEIRS = {"constant": "constant_with_warmup", "linear": "linear", "cosine": "cosine"}
SHORT = {"steps": 4, "steps_1": 4, "steps_2": 4, "steps_3": 4, "views": 2, "prior_weight": 0.0}
SHORT |= {f"batch_size{stage}": 1 for stage in ("", "_1", "_2", "_3")}
SHORT |= {"lora_rank": 4, "min_rank": 2}


def rates_of_diffusers(name, rate, warmup, steps):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=rate)
    scheduler = get_scheduler(THEIRS[name], optimizer, num_warmup_steps=warmup, num_training_steps=steps)
    found = []
    for _ in range(steps):
        found += scheduler.get_last_lr()
        optimizer.step()
        scheduler.step()
    return found


@pytest.mark.parametrize("warmup", [0, 1, 7, 20, 30])
@pytest.mark.parametrize("name", SCHEDULES)
def test_rates_are_those_of_diffusers(name, warmup):
    optimization = Optimization(lr_scheduler=name, lr_warmup_steps=warmup)
    ours = [3e-4 * optimization.factor(step, 20) for step in range(20)]
    assert ours == pytest.approx(rates_of_diffusers(name, 3e-4, warmup, 20), rel=1e-12)


@dataclass(kw_only=True)
class Recorder(SingleDevice):
    """A device that writes down the learning rates of every step."""

    rates: list = field(default_factory=list)

    def step(self, optimizer):
        self.rates.append([group["lr"] for group in optimizer.param_groups])
        super().step(optimizer)


def short(recipe, **changes):
    known = {f.name for f in dataclasses.fields(recipe)}
    return dataclasses.replace(recipe, **{name: v for name, v in (SHORT | changes).items() if name in known})


@pytest.mark.parametrize("method", METHODS)
def test_every_method_learns_at_them_in_every_stage(tmp_path, method):
    concept = Concept(images=(torch.rand(3, 32, 32, generator=torch.Generator().manual_seed(5)),), resolution=32)
    rates = {}
    for name in ("constant", "cosine"):
        recipe = short([*METHODS[method].values()][-1], lr_scheduler=name, lr_warmup_steps=1 if name == "cosine" else 0)
        device = Recorder(device=torch.device("cpu"))
        training.train(Run(concept=concept, recipe=recipe), small.models(), tmp_path / name, device=device)
        rates[name] = device.rates
    for step, (plain, own) in enumerate(zip(rates["constant"], rates["cosine"], strict=True)):
        wanted = [rates_of_diffusers("cosine", rate, 1, 4)[step % 4] for rate in plain]
        assert own == pytest.approx(wanted, rel=1e-12) and all(plain)


@pytest.mark.parametrize(("optimizer", "stop_after"), [("adamw", 1), ("adamw", 4), ("prodigy", 4)])
def test_a_kill_changes_nothing(tmp_path, optimizer, stop_after):
    recipe = dataclasses.replace(FAST, lr_scheduler="linear", lr_warmup_steps=2, optimizer=optimizer)
    train_textboost(tmp_path / "whole" / "run", recipe)
    folder = tmp_path / "broken" / "run"
    with pytest.raises(Killed):
        train_textboost(folder, recipe, stop_after=stop_after)
    train_textboost(folder, recipe)
    assert learned(folder) == learned(tmp_path / "whole" / "run")


@pytest.mark.parametrize(
    ("changes", "begins"),
    [({}, 4), ({"lr_warmup_steps": 2}, 4), ({"lr_scheduler": "linear"}, 1), ({"optimizer": "prodigy"}, 1)],
    ids=str,
)
def test_more_steps_follow_only_where_the_rates_allow_it(tmp_path, changes, begins):
    """What ended at a rate of 0, or forgot the rate that it had found, is no beginning of a longer training."""
    recipe, steps = dataclasses.replace(FAST, steps=3, **changes), []
    train_textboost(tmp_path / "short", recipe)
    callbacks = training.Callbacks(on_step=lambda report: steps.append(report.step))
    train_textboost(tmp_path / "long", dataclasses.replace(recipe, steps=4), callbacks=callbacks)
    assert steps == list(range(begins, 5))


def test_the_file_says_how_the_rates_went(tmp_path):
    recipe = dataclasses.replace(FAST, steps=2, optimizer="prodigy", lr_scheduler="cosine", lr_warmup_steps=1)
    written = train_textboost(tmp_path, recipe).metadata()
    assert written["ss_optimizer"] == "prodigyopt.prodigy.Prodigy(weight_decay=0.01)"
    assert (written["ss_lr_scheduler"], written["ss_lr_warmup_steps"]) == ("cosine", "1")
