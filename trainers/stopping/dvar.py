"""DVAR: stop when the loss on one fixed batch hardly varies any more.

Paper: "Is This Loss Informative? Faster Text-to-Image Customization by Tracking Objective Dynamics", arXiv 2302.04841.
The training loss is noisy, because images, noise and timesteps change at every step. With all of them fixed, and the
first images and templates in their order, the mean squared error falls and settles: with H its values so far,
`var(H[-window:]) / var(H)` below a threshold ends the stage. H starts with the untrained model.

Differences to the authors' code:
- The window counts steps, so that evaluating only every k-th step keeps it. The presets called "paper" evaluate every
  step as theirs do; those of the same methods without that word every 8th.
- Images and captions that `fixed_parts` does not fix are drawn as in the training; theirs are the next ones in order.
- Theirs ends one optimizer step after the evaluation that decides it; here the state that was evaluated is returned.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from statistics import fmean

import numpy as np
import torch
from torch import Tensor

from ..data.batch import Batch
from ..settings import same, setting
from ..training import losses
from ..training.cuda_graph import GraphedPass, Pass
from ..training.objective import Objective
from ..training.stage import Stage
from ..training.step_inputs import StepInputs, placed
from .monitor import KEEP, Evaluator, FixedSteps, Measurement, StageContext

PARTS = ("images", "latents", "noise", "captions", "timesteps")  # in the order of `fixed_parts`
# Thirds of the schedule of 1000 timesteps, as in the authors' code without the last timestep.
INTERVALS = {"begin": (0, 333), "middle": (333, 666), "end": (666, 999)}
SMOOTH = 10  # values that are averaged before the best state is chosen


@dataclass(frozen=True, kw_only=True)
class DVAR:
    """Settings of DVAR; the defaults are the authors' for Textual Inversion."""

    window: int = setting(
        310, "Number of recent steps over which the loss must have become stable.", min=2, max=100_000
    )
    threshold: float = setting(
        0.15,
        "Stop when the variance of the loss in the window, divided by its variance so far, falls below this value.",
        min=0.0,
        max=1.0,
    )
    every: int = setting(
        1, "Steps between evaluations; fewer evaluations take less time and keep the window.", min=1, max=10_000
    )
    batch_size: int = setting(4, "Number of images in the fixed batch.", min=1, max=512)
    stage: str = same(FixedSteps, "stage", "all")
    min_steps: int = setting(0, "Never stop a stage before this step.", min=0, max=100_000)
    max_steps: int = setting(
        0, "Always stop a stage at this step; 0 leaves its length to the recipe.", min=0, max=100_000
    )
    stop_training: bool = same(FixedSteps, "stop_training")
    keep: str = setting(
        "last", "Return the last state, or the one with the lowest loss on the fixed batch (best).", options=KEEP
    )
    accumulation: int = setting(
        1,
        "Evaluate the fixed batch at this many sets of timesteps: 128 sets of 4 images act like a batch of 512.",
        min=1,
        max=250,
        advanced=True,
    )
    fixed_parts: str = setting(
        "11111",
        "Five digits for images, latents, noise, captions and timesteps: 1 is fixed, 0 is sampled again at each "
        "evaluation; 11111 is DVAR.",
        advanced=True,
    )
    mean_latent: bool = setting(
        False, "Use the mean of the autoencoder's posterior instead of a sample.", advanced=True
    )
    zero_noise: bool = setting(False, "Evaluate the images without added noise.", advanced=True)
    intervals: bool = setting(
        False, "Also record the loss on the first, middle and last third of the timesteps.", advanced=True
    )
    seed: int = setting(59, "Seed of the fixed batch.", min=0, max=2**63 - 1, advanced=True)
    rotate_timesteps: bool = setting(
        False, "Evaluate one accumulated set of timesteps at a time, in turn: a large batch at a small one's cost.",
        advanced=True,
    )  # fmt: skip

    name = "DVAR"

    def __post_init__(self):
        if len(self.fixed_parts) != len(PARTS) or set(self.fixed_parts) - {"0", "1"}:
            raise ValueError(
                f"fixed_parts of DVAR is {self.fixed_parts!r}: write five digits, 1 for what stays fixed and 0 for "
                f"what is drawn again at each evaluation, in the order {', '.join(PARTS)}."
            )

    @property
    def evaluations(self) -> int:
        """Evaluations within the window."""
        return max(2, self.window // self.every)

    def evaluator(self, stage_context: StageContext) -> Evaluator:
        """Return the function that evaluates this stage."""
        fixed_batch_loss = FixedBatch(self, stage_context)

        def measure(step: int, past: list[Measurement]) -> Measurement | None:
            if step % self.every:
                return None
            parts = self._parts(fixed_batch_loss, step, past)
            values = [*(earlier["fixed_loss"] for earlier in past), fmean(parts)]
            found = {
                "fixed_loss": values[-1],
                "smoothed": fmean(values[-SMOOTH:]),
                "ratio": variance_ratio(values, self.evaluations),
                "threshold": self.threshold,
            }
            if self.rotate_timesteps:
                found["parts"] = parts if not past else parts[self._turn(past) :][:1]
            return found | (
                {name: fmean(fixed_batch_loss(step, *ends)) for name, ends in INTERVALS.items()}
                if self.intervals
                else {}
            )

        return measure

    def _parts(self, fixed_batch_loss: "FixedBatch", step: int, past: list[Measurement]) -> list[float]:
        """Return the newest loss at each accumulated part of the timesteps; all are new unless they take turns."""
        if not (self.rotate_timesteps and past):
            return fixed_batch_loss(step)
        parts = list(past[0]["parts"])
        for turn, earlier in enumerate(past[1:]):
            parts[turn % len(parts)] = earlier["parts"][0]
        turn = self._turn(past)
        parts[turn] = fixed_batch_loss(step, only=turn)[0]
        return parts

    def _turn(self, past: list[Measurement]) -> int:
        return (len(past) - 1) % len(past[0]["parts"])

    def reason(self, measure: Measurement) -> str:
        """Say why to stop after this evaluation; "" to continue."""
        if measure["ratio"] >= self.threshold:
            return ""
        return (
            f"the variance over the last {self.window} steps is {measure['ratio']:.3f} of all, below {self.threshold:g}"
        )

    def quality(self, measure: Measurement) -> float:
        """Return minus the smoothed loss: more is better."""
        return -measure["smoothed"]

    def warning(self, stage: Stage) -> str:
        """Say what to change where DVAR can never stop this stage; "" where it can."""
        steps = min(stage.steps, self.max_steps or stage.steps)
        if (self.evaluations - 1) * self.every < steps:
            return ""
        return (
            f"DVAR's window of {self.window} steps does not fit into the {steps} steps of {stage.name}, too long to "
            f"stop it: choose a preset for short runs, or set window to about {max(2, 2 * steps // 5)}."
        )


def variance_ratio(values: list[float], window: int) -> float:
    """Return `var(last window values) / var(all values)`, population variances; 1 with too few or equal values."""
    everything = float(np.var(values))
    if len(values) < window or not everything:
        return 1.0
    return float(np.var(values[-window:])) / everything


class FixedBatch:
    """Denoising loss on a fixed batch; parts of it may be drawn again at each evaluation."""

    def __init__(self, settings: DVAR, stage_context: StageContext):
        self.settings, self.stage_context = settings, stage_context
        self.objective = Objective(stage_context.models, {"denoising": losses.denoising})
        self.fixed = stage_context.first(settings.batch_size, settings.seed)
        # Four images are launched for longer than they are computed.
        graphed = GraphedPass(self._losses, (), lambda reason: None)
        self.inputs: dict[tuple[int, int], list[StepInputs]] = {}  # by the timesteps' limits
        self.run: Pass = graphed if stage_context.device.captures else self._losses

    def __call__(self, step: int, low: int = 0, high: int | None = None, only: int | None = None) -> list[float]:
        """Return the denoising loss at each accumulated part of the timesteps.

        Args:
            low, high: timesteps are drawn from `low <= t < high`.
            only: number of the only part to evaluate; `None` for all.
        """
        which = low, high or len(self.stage_context.models.alphas_cumprod)
        if "0" in self.settings.fixed_parts:
            self.inputs.clear()
        if which not in self.inputs:
            self.inputs[which] = self._inputs(step, *which)
        chosen = self.inputs[which] if only is None else self.inputs[which][only : only + 1]
        # A graph writes every loss to the same place.
        return torch.stack([self.run(inputs)["denoising"].clone() for inputs in chosen]).tolist()

    def _inputs(self, step: int, low: int, high: int) -> list[StepInputs]:
        """Return what is evaluated, on the device, for each accumulated part of the timesteps."""
        batch, place = self._batch(step), partial(placed, device=self.stage_context.device.device)
        noise = self._drawn("noise", step, lambda g: torch.randn(batch.latents.shape, generator=g))
        noise = place(noise * (not self.settings.zero_noise))
        batch, size = batch.map(place), len(batch)
        return [
            StepInputs(batch=batch, noise=noise, timesteps=place(timesteps), of=size)
            for timesteps in self._timesteps(step, low, high, size)
        ]

    def _losses(self, inputs: StepInputs) -> dict[str, Tensor]:
        with self.stage_context.device.autocast():
            return self.objective(inputs.batch, inputs.noise, inputs.timesteps)

    def _batch(self, step: int) -> Batch:
        images = self._fixed_or_new("images", step)
        latents = images.latents
        if images.posterior is not None:
            mean, deviation = images.posterior.chunk(2, dim=1)
            drawn = self._drawn("latents", step, lambda g: torch.randn(mean.shape, generator=g))
            latents = mean + deviation * drawn * (not self.settings.mean_latent)
        # Without the masks of Custom Diffusion, whose loss the authors look at as a plain mean squared error.
        return replace(images, masks=None, latents=latents, input_ids=self._fixed_or_new("captions", step).input_ids)

    def _fixed_or_new(self, part: str, step: int) -> Batch:
        if self._is_fixed(part):
            return self.fixed
        return self.stage_context.batch(self.settings.batch_size, self._seed(part, step))

    def _timesteps(self, step: int, low: int, high: int, size: int) -> list[Tensor]:
        """Return chunks of a random permutation of the timesteps, `size` in each."""
        order = low + self._drawn("timesteps", step, lambda g: torch.randperm(high - low, generator=g))
        chunks = order.split(size)[: self.settings.accumulation]
        return [chunk for chunk in chunks if len(chunk) == size]

    def _drawn(self, part: str, step: int, draw: Callable[[torch.Generator], Tensor]) -> Tensor:
        return draw(torch.Generator().manual_seed(self._seed(part, step)))

    def _seed(self, part: str, step: int) -> int:
        """Return the seed of a part; a part that is not fixed has another one at each step."""
        again = 0 if self._is_fixed(part) else step + 1
        return (self.settings.seed + 1_000_003 * (1 + PARTS.index(part)) + 7_368_787 * again) % 2**63

    def _is_fixed(self, part: str) -> bool:
        return self.settings.fixed_parts[PARTS.index(part)] == "1"


# An evaluation costs half a step or more where the batch size is 2: after every step, as in the paper, a third or more
# of the training's time; after every 8th a tenth at most.
# The paper's windows are longer than the runs of the first four. Of a loss that falls evenly, a window of w steps after
# n makes a ratio of (w / n)^2, so one of 0.4 n never stops a falling loss; 32 samples make the curve smooth enough.
PAPER = {
    "Textual Inversion": DVAR(),
    "DreamBooth-LoRA": replace(DVAR(), window=440, threshold=0.4),
    "Custom Diffusion": replace(DVAR(), window=180),
}
SHORT = replace(DVAR(), window=100, every=4, accumulation=8, rotate_timesteps=True)
PRESETS = {
    "TextBoost": replace(SHORT, every=8, threshold=0.02),  # identity improves long after the loss has settled
    "AttnDreamBooth 1": replace(SHORT, window=24, every=2, stage="1"),
    "AttnDreamBooth 2": replace(SHORT, window=40, stage="2"),
    "AttnDreamBooth 3": replace(SHORT, window=80, stage="3"),
    **{method: replace(preset, every=8) for method, preset in PAPER.items()},
    **{f"{method}, paper": preset for method, preset in PAPER.items()},
}
