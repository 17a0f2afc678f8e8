"""When a stage ends before its last step: monitors look at a training from outside and never change what it learns.

A monitor is a frozen dataclass of settings (`DVAR`, `ClipEarlyStopping`, `FixedSteps`). What it measured stands in the
run's log, and every decision follows from the log alone, so that a run that was killed goes on as if it had not been.
"""

import contextlib
import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Generator, Tensor

from ..data.batch import Batch
from ..data.concept import Concept
from ..data.context import Context
from ..device import SingleDevice
from ..models.diffusion import Models
from ..settings import setting
from ..training.stage import Stage, StepReport

STAGES = ("all", "1", "2", "3")
KEEP = ("last", "best")
STOPPED_BY_USER = "you"  # in the place of a monitor, who pressed "Finish now"

# What one monitor found at one step, as JSON: names of its own to numbers, or to lists of them.
Measurement = dict
# (steps done in this stage, what it found so far) -> what it finds now; `None` where it does not look.
Evaluator = Callable[[int, list[Measurement]], Measurement | None]


class Monitor(Protocol):
    """Settings of one way to stop."""

    name: str  # under which its measures stand in the log
    every: int  # steps between two looks at the model; of no meaning where it takes none
    stage: str  # "all", or the number of the one stage that it watches
    min_steps: int  # of a stage; earlier it does not fire
    max_steps: int  # of a stage; 0 for the stage's own
    stop_training: bool  # False: only notes where it would have stopped
    keep: str  # "last"; "best": what is returned is the state that it liked best; "all": each that it looked at stays

    def evaluator(self, stage_context: "StageContext") -> Evaluator:
        """What measures one stage. `sight` may be looked at only."""

    def reason(self, measure: Measurement) -> str:
        """Why to stop, as a sentence without its end; "" for going on."""

    def quality(self, measure: Measurement) -> float:
        """How good the model is, more is better."""

    def warning(self, stage: Stage) -> str:
        """What to set where it can never fire in this stage; "" where it can."""


@dataclass(frozen=True, kw_only=True)
class StageContext:
    """What a monitor sees of a stage."""

    models: Models
    stage: Stage
    concept: Concept
    device: SingleDevice
    generator: Generator  # the run's own: see `borrowed`
    subject: str  # as it stands in prompts
    context: Context = Context()

    def batch(self, size: int, seed: int) -> Batch:
        """`size` samples such as the stage learns from, all of one shape; another seed gives others.

        A stage's batches remember nothing but the run's generator, so drawing some aside does not change the others.
        """
        with borrowed(self.generator, seed):
            found: list[Batch] = []
            while sum(map(len, found)) < size:
                batch = next(self.stage.batches).instances()
                if not found or batch.latents.shape[1:] == found[0].latents.shape[1:]:
                    found.append(batch)
        return Batch.joined(found).map(lambda tensor: tensor[:size])

    def first(self, size: int, seed: int) -> Batch:
        """The first `size` images and templates in their order, as the stage learns from them."""
        with borrowed(self.generator, seed):
            return self.stage.first(size)


@contextlib.contextmanager
def borrowed(generator: Generator, seed: int) -> Iterator[None]:
    """The generator with a seed of our own, and afterwards as it was."""
    before = generator.get_state()
    generator.manual_seed(seed)
    try:
        yield
    finally:
        generator.set_state(before)


class NeverStops:
    """What it measures, if anything, is no reason to stop."""

    def reason(self, measure: Measurement) -> str:
        return ""

    def quality(self, measure: Measurement) -> float:
        return 0.0

    def warning(self, stage: Stage) -> str:
        return ""


@dataclass(frozen=True, kw_only=True)
class FixedSteps(NeverStops):
    """Ends each stage after a number of steps, whatever its recipe says."""

    steps: int = setting(
        100, "Number of steps after which a stage ends; a shorter stage ends by itself.", min=1, max=100_000
    )
    stage: str = setting("all", "Number of the training stage that this applies to, or all.", options=STAGES)
    stop_training: bool = setting(
        True, "End the stage when this monitor fires; off: only record where it would have ended.", advanced=True
    )

    name = "Fixed Steps"
    every = 1
    keep = "last"
    min_steps = 0

    @property
    def max_steps(self) -> int:
        return self.steps

    def evaluator(self, stage_context: StageContext) -> Evaluator:
        return lambda step, past: None


class StageMonitors:
    """The monitors of one stage at work, and the best state so far where one of them keeps it."""

    def __init__(
        self,
        monitors: Sequence[Monitor],
        stage_context: StageContext,
        entries: list[dict],
        best: tuple[Tensor, ...] = (),
    ):
        """Look at the stage before its first step, unless its log already has lines."""
        self.monitors = of_stage(monitors, stage_context.stage.number)
        self.evaluators = {name: monitor.evaluator(stage_context) for name, monitor in self.monitors.items()}
        self.keeper = next((name for name, monitor in self.monitors.items() if monitor.keep == "best"), "")
        self.params, self.best = stage_context.stage.parameters(), best
        self.start = entries[0].get("start", {}) if entries else self.evaluate(0, [])

    @torch.no_grad()
    def evaluate(self, step: int, entries: list[dict]) -> dict[str, Measurement]:
        """What the monitors find after `step` steps.

        Args:
            entries: the stage's lines of the log so far.
        """
        found = {}
        for name, evaluator in self.evaluators.items():
            started = time.perf_counter()
            past = [self.start, *(entry.get("measures", {}) for entry in entries)] if step else []
            measure = evaluator(step, [measures[name] for measures in past if name in measures])
            if measure is not None:
                found[name] = {**measure, "seconds": time.perf_counter() - started}
        return found

    def keep(self, entries: list[dict]) -> None:
        """Copy the parameters where the state after the last line is the best one so far."""
        if self.keeper and best_step(self.keeper, self.monitors[self.keeper], entries) == entries[-1]["stage_step"]:
            self.best = tuple(parameter.detach().to("cpu", copy=True) for parameter in self.params)

    def keeps(self, report: StepReport) -> bool:
        """Whether a monitor wants the state after this step to be kept next to others."""
        return any(monitor.keep == "all" and name in report.measures for name, monitor in self.monitors.items())

    def acts(self, entry: dict) -> bool:
        """Whether a monitor ends the stage after this line of the log."""
        return any(
            monitor.stop_training and reason_to_stop(name, monitor, entry) for name, monitor in self.monitors.items()
        )


def of_stage(monitors: Sequence[Monitor], number: int) -> dict[str, Monitor]:
    """The monitors that watch the stage of this number, by their own names, with a count behind a second one."""
    named: dict[str, Monitor] = {}
    for monitor in monitors:
        if monitor.stage in ("all", str(number)):
            count = 1 + sum(type(other) is type(monitor) for other in named.values())
            named[monitor.name if count == 1 else f"{monitor.name} {count}"] = monitor
    return named


def stops(monitors: Sequence[Monitor], stage: Stage, entries: list[dict]) -> list[dict]:
    """Where each monitor fired first in a stage that has ended, whether it acted or only noted it."""
    found = []
    for name, monitor in of_stage(monitors, stage.number).items():
        fired = ((entry, reason) for entry in entries if (reason := reason_to_stop(name, monitor, entry)))
        found += [_stop(name, *first, monitor.stop_training) for first in itertools.islice(fired, 1)]
    if len(entries) < stage.steps and not any(stop["acted"] for stop in found):
        found += [_stop(STOPPED_BY_USER, entry, "finished by hand", True) for entry in entries[-1:]]
    return found


def ending(monitors: Sequence[Monitor], stage: Stage, entries: list[dict], found: list[dict]) -> str:
    """How a stage ended, in words; "" where it ran to its end and its last state is what is returned.

    Args:
        found: what `stops` says of it.
    """
    acted = [stop for stop in found if stop["acted"]]
    who = [f"{'' if stop['monitor'] == STOPPED_BY_USER else stop['monitor'] + ', '}{stop['reason']}" for stop in acted]
    words = [f"{stage.name} ended after step {entries[-1]['stage_step']}: {' and '.join(who)}"] if who else []
    for name, monitor in of_stage(monitors, stage.number).items():
        if monitor.keep == "best" and (step := best_step(name, monitor, entries)):
            words.append(f"of {stage.name} the state after step {step} is kept, the best by {name}")
            break
    return "; ".join(words)


def _stop(name: str, entry: dict, reason: str, acted: bool) -> dict:
    where = {key: entry[key] for key in ("stage", "step", "stage_step")}
    return {**where, "monitor": name, "reason": reason, "acted": acted}


def best_step(name: str, monitor: Monitor, entries: list[dict]) -> int:
    """The step of the stage whose state a monitor likes best; 0 for none."""
    late = [e for e in entries if e["stage_step"] >= monitor.min_steps and name in e.get("measures", {})]
    best = max(late, key=lambda entry: monitor.quality(entry["measures"][name]), default={"stage_step": 0})
    return best["stage_step"]


def reason_to_stop(name: str, monitor: Monitor, entry: dict) -> str:
    """Why to stop after this line of the log; "" for going on."""
    step, measure = entry["stage_step"], entry.get("measures", {}).get(name)
    if monitor.max_steps and step >= monitor.max_steps:
        return f"{monitor.max_steps} steps at most"
    return monitor.reason(measure) if measure and step >= monitor.min_steps else ""
