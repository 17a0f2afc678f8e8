"""The one training loop. It knows stages, not methods: what differs between methods is in the `Stage` it is given."""

import contextlib
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import ClassVar, TypeVar

import torch
from torch import Generator, Tensor

from .models import Models
from .objective import Batch, Loss, Objective
from .optimizers import adamw
from .state import StageState, capture, restore

T = TypeVar("T")
Shared = Batch | Tensor


@dataclass(kw_only=True)
class Stage:
    """What trains, on what, against which losses; stopping comes from outside."""

    name: str
    steps: int
    batch_size: int  # samples of one step, however it is split
    params: list[dict]  # optimizer groups, the only statement of what trains; "max_grad_norm" clips a group
    batches: Iterator[Batch]  # with no memory of its own but the run's generator, so that a run can be resumed
    losses: dict[str, tuple[float, Loss]]  # name -> (weight, loss)
    timesteps: Callable[[int], Tensor]
    weight_decay: float = 1e-2
    moment_bits: int = 32  # of each of the two moments that AdamW remembers of a value
    after_step: Callable[[], None] = lambda: None

    def parameters(self) -> list[torch.nn.Parameter]:
        return [parameter for group in self.params for parameter in group["params"]]


@dataclass(frozen=True, kw_only=True)
class StepReport:
    """What a step tells the outside."""

    step: int  # steps done so far
    steps: int
    stage: str
    loss: float
    terms: dict[str, float]
    seconds: float  # since the stage began
    measures: dict[str, dict[str, float]] = field(default_factory=dict)  # by monitor, after this step


class Diverged(FloatingPointError):
    """The loss of `step` is no longer a number, so the parameters after `step - 1` are not to be trusted."""

    def __init__(self, step: int, loss: float):
        super().__init__(
            f"The loss became {loss} at step {step}: lower the learning rates, or set the precision to float32."
        )
        self.step = step


@dataclass(kw_only=True)
class SingleDevice:
    """One device and its precision: the few calls the loop makes, as Accelerate offers them for many devices."""

    device: torch.device
    dtype: torch.dtype = torch.float32
    scaler: torch.amp.GradScaler = field(init=False)
    alone: ClassVar[bool] = True  # no other process works on the same training

    def __post_init__(self):
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.dtype == torch.float16)

    def autocast(self) -> contextlib.AbstractContextManager:
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    def share(self, *whole: Shared) -> tuple[Shared, ...]:
        """This device's part of a batch, its noise and its timesteps."""
        return whole

    def total(self, sums: dict[str, Tensor]) -> dict[str, float]:
        """What the devices' parts add up to."""
        return {name: float(value) for name, value in sums.items()}

    def agreed(self, found: T) -> T:
        """What all devices go by, where each has looked for itself; something that JSON can hold."""
        return found

    def backward(self, loss: Tensor) -> None:
        self.scaler.scale(loss).backward()

    def step(self, optimizer: torch.optim.Optimizer) -> None:
        """Clip the groups that ask for it, then update; with float16, skip a step whose gradients overflowed."""
        self.scaler.unscale_(optimizer)
        for group in optimizer.param_groups:
            if group.get("max_grad_norm"):
                torch.nn.utils.clip_grad_norm_(group["params"], group["max_grad_norm"])
        self.scaler.step(optimizer)
        self.scaler.update()
        optimizer.zero_grad(set_to_none=True)


def train_stage(
    stage: Stage,
    models: Models,
    device: SingleDevice,
    generator: Generator,
    *,
    micro_batch_size: int = 0,
    start: StageState | None = None,
    on_step: Callable[[StepReport, Callable[[], StageState]], None] = lambda report, state: None,
    should_stop: Callable[[StepReport], bool] = lambda report: False,
) -> StageState:
    """Train one stage and return where it stands at its end.

    Args:
        generator: draws the noise; every random number of a run comes from it.
        micro_batch_size: samples that go through the model at once; gradients add up to those of the whole batch.
        start: go on from here instead of from the beginning.
        on_step: called after every step with its report and a function that copies the state, to be called at once or
            not at all; an exception it raises ends the training.

    Raises:
        Diverged: the loss is no longer a number.
        RuntimeError: a parameter that the stage declares receives no gradient.
    """
    freeze_all_but(stage, models)
    objective = Objective(models, {name: loss for name, (_, loss) in stage.losses.items()})
    optimizer = adamw(stage.params, stage.weight_decay, stage.moment_bits)
    trained = stage.parameters(), generator, optimizer, device.scaler
    if start:
        restore(start, *trained)
    done, before = (start.step, start.seconds) if start else (0, 0.0)
    started = time.perf_counter()
    for step in range(done + 1, stage.steps + 1):
        terms = forward_backward(stage, objective, device, generator, micro_batch_size)
        if step == done + 1:
            check_gradients(stage)
        loss = sum(weight * terms[name] for name, (weight, _) in stage.losses.items())
        if not math.isfinite(loss):
            raise Diverged(step, loss)
        device.step(optimizer)
        stage.after_step()
        seconds = before + time.perf_counter() - started
        report = StepReport(step=step, steps=stage.steps, stage=stage.name, loss=loss, terms=terms, seconds=seconds)
        on_step(report, partial(capture, step, seconds, *trained))
        if should_stop(report):
            break
    return capture(step, seconds, stage.parameters(), generator) if done < stage.steps else start


def forward_backward(
    stage: Stage, objective: Objective, device: SingleDevice, generator: Generator, micro_batch_size: int
) -> dict[str, float]:
    """One batch through the model and back; returns each loss term, unweighted.

    Noise and timesteps are drawn for the whole batch, so that results do not depend on how it is split.
    """
    whole = next(stage.batches)
    noise = torch.randn(whole.latents.shape, generator=generator)
    batch, noise, timesteps = device.share(whole, noise, stage.timesteps(len(whole)))
    parts = max(1, -(-len(batch) // micro_batch_size)) if micro_batch_size else 1
    sums = dict.fromkeys(stage.losses, 0.0)
    for part, e, t in zip(batch.split(parts), noise.tensor_split(parts), timesteps.tensor_split(parts), strict=True):
        share = len(part) / len(whole)
        with device.autocast():
            terms = objective(part.map(lambda x: x.to(device.device)), e.to(device.device), t.to(device.device))
            loss = sum(weight * terms[name] for name, (weight, _) in stage.losses.items())
        device.backward(loss * share)
        for name, term in terms.items():
            sums[name] = sums[name] + term.detach() * share
    return device.total(sums)


def freeze_all_but(stage: Stage, models: Models) -> None:
    """Only what the stage declares keeps a gradient."""
    for module in (models.unet, *models.text_encoders):
        module.requires_grad_(False)
    for parameter in stage.parameters():
        parameter.requires_grad_(True)


def check_gradients(stage: Stage) -> None:
    """A parameter without a gradient trains in name only; better to know at once."""
    idle = sum(parameter.grad is None for parameter in stage.parameters())
    if idle:
        raise RuntimeError(f"{idle} of the parameters of stage {stage.name!r} receive no gradient.")
