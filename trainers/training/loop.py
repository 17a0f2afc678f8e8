"""The one training loop. It knows stages, not methods: what differs between methods is in the `Stage` it is given."""

import math
import time
from collections.abc import Callable
from functools import partial

import torch
from torch import Generator, Tensor

from ..device import SingleDevice
from ..models.diffusion import Encoding, Models
from .cuda_graph import GraphedPass, Pass
from .objective import KnownPrompts, Objective
from .optimizers import optimizer_of, set_learning_rates
from .stage import Diverged, Stage, StepReport, freeze_all_but
from .state import StageState, capture, restore
from .step_inputs import Ahead, StepInputs, placed


def train_stage(
    stage: Stage,
    models: Models,
    device: SingleDevice,
    generator: Generator,
    *,
    micro_batch_size: int = 0,
    start: StageState | None = None,
    earlier: tuple[int, float] = (0, 0.0),
    on_step: Callable[[StepReport, Callable[[], StageState]], None] = lambda report, state: None,
    should_stop: Callable[[StepReport], bool] = lambda report: False,
    notice: Callable[[str], None] = lambda sentence: None,
) -> StageState:
    """Train one stage and return where it stands at its end.

    Args:
        generator: draws the noise; every random number of a run comes from it.
        micro_batch_size: samples that go through the model at once; gradients add up to those of the whole batch.
        start: go on from here instead of from the beginning.
        earlier: steps and seconds of the stages before this one.
        on_step: called after every step with its report and a function that copies the state, to be called at once or
            not at all; an exception it raises ends the training.
        notice: is told in a sentence why something quicker could not be done.

    Raises:
        Diverged: the loss is no longer a number.
        RuntimeError: a parameter that the stage declares receives no gradient.
    """
    freeze_all_but(stage, models)
    for parameter in stage.parameters():
        parameter.grad = None  # of an attempt that failed between two parts of a batch
    objective = Objective(models, {name: loss for name, (_, loss) in stage.losses.items()})
    optimizer = optimizer_of(stage.params, stage.optimization)
    trained = stage.parameters(), generator, optimizer, device.scaler
    if start:
        restore(start, *trained)
    done, before = (start.step, start.seconds) if start else (0, 0.0)
    started = time.perf_counter()
    run = fastest_pass(stage, objective, device, micro_batch_size, notice)
    known = known_prompts(models, device)
    inputs = Ahead(partial(draw, stage, device, generator, known), generator, partial(placed, device=device.device))
    for step in range(done + 1, stage.steps + 1):
        sums = run(inputs.take())
        if step == done + 1:
            check_gradients(stage)
        set_learning_rates(optimizer, stage.optimization.factor(step - 1, stage.steps))
        device.step(optimizer)
        stage.after_step()
        if step < stage.steps:
            inputs.prepare()  # before the first wait for the device, which then has something to do
        terms = device.total(sums)
        loss = sum(weight * terms[name] for name, (weight, _) in stage.losses.items())
        if not math.isfinite(loss):
            raise Diverged(step, loss)
        seconds = before + time.perf_counter() - started
        report = StepReport(
            step=earlier[0] + step, stage=stage.name, number=stage.number, stage_step=step, steps=stage.steps,
            loss=loss, terms=terms, seconds=earlier[1] + seconds,
        )  # fmt: skip
        on_step(report, partial(capture, step, seconds, *trained))
        if should_stop(report):
            break
    if start and done >= stage.steps:
        return start
    return capture(step, seconds, stage.parameters(), generator)


def known_prompts(models: Models, device: SingleDevice) -> KnownPrompts | None:
    """Prompts that are encoded once; `None` where a text encoder trains."""
    if any(parameter.requires_grad for encoder in models.text_encoders for parameter in encoder.parameters()):
        return None

    @torch.no_grad()
    def encode(ids: Tensor) -> Encoding:
        with device.autocast():
            return models.encode_ids(placed(ids, device.device))

    return KnownPrompts(encode)


def draw(stage: Stage, device: SingleDevice, generator: Generator, known: KnownPrompts | None = None) -> StepInputs:
    """The inputs of the next step, on the CPU but for encodings that are known already.

    Noise and timesteps are drawn for the whole batch, so that results do not depend on how it is split.
    """
    whole = next(stage.batches)
    noise = stage.noise.draw(whole.latents.shape, generator)
    batch, noise, timesteps = device.share(whole, noise, stage.timesteps(len(whole)))
    batch = known.fill(batch) if known else batch
    return StepInputs(batch=batch, noise=noise, timesteps=timesteps, of=len(whole))


def forward_backward(
    stage: Stage, objective: Objective, device: SingleDevice, generator: Generator, micro_batch_size: int
) -> dict[str, float]:
    """One batch through the model and back; returns each loss term, unweighted."""
    inputs = draw(stage, device, generator).map(partial(placed, device=device.device))
    return device.total(run_pass(stage, objective, device, micro_batch_size, inputs))


def fastest_pass(
    stage: Stage, objective: Objective, device: SingleDevice, micro_batch_size: int, notice: Callable[[str], None]
) -> Pass:
    """`run_pass`; on a card that holds the whole batch with its activations, as one CUDA graph."""
    run, models = partial(run_pass, stage, objective, device, micro_batch_size), objective.models
    whole = not 0 < micro_batch_size < stage.batch_size and not models.checkpointing
    if device.captures and whole:
        return GraphedPass(run, stage.parameters(), notice)
    return run


def run_pass(
    stage: Stage, objective: Objective, device: SingleDevice, micro_batch_size: int, inputs: StepInputs
) -> dict[str, Tensor]:
    """Inputs through the model and back; returns each loss term, unweighted, still on the device."""
    size = len(inputs.batch)
    parts = max(1, -(-size // micro_batch_size)) if micro_batch_size else 1
    sums: dict = dict.fromkeys(stage.losses, 0.0)
    for part in inputs.split(parts):
        share = len(part.batch) / inputs.of
        try:
            with device.autocast():
                terms = objective(part.batch, part.noise, part.timesteps)
                loss = sum(weight * terms[name] for name, (weight, _) in stage.losses.items())
            device.backward(loss * share)
        finally:
            stage.after_pass()
        for name, term in terms.items():
            sums[name] = sums[name] + term.detach() * share
    return sums


def check_gradients(stage: Stage) -> None:
    """A parameter without a gradient trains in name only; better to know at once."""
    idle = sum(parameter.grad is None for parameter in stage.parameters())
    if idle:
        raise RuntimeError(f"{idle} of the parameters of stage {stage.name!r} receive no gradient.")
