"""The one training loop. It knows stages, not methods: what differs between methods is in the `Stage` it is given."""

import math
import time
from collections.abc import Callable
from functools import partial

import torch
from torch import Generator

from ..device import SingleDevice
from ..models.diffusion import Models
from .objective import Objective
from .optimizers import adamw
from .stage import Diverged, Stage, StepReport, freeze_all_but
from .state import StageState, capture, restore


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


def check_gradients(stage: Stage) -> None:
    """A parameter without a gradient trains in name only; better to know at once."""
    idle = sum(parameter.grad is None for parameter in stage.parameters())
    if idle:
        raise RuntimeError(f"{idle} of the parameters of stage {stage.name!r} receive no gradient.")
