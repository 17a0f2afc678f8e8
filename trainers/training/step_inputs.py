"""Inputs of a stage's steps: drawn on the CPU one step ahead, and on the device when their step begins."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Generator, Tensor

from ..data.batch import Batch, share
from ..settings import setting


@dataclass(frozen=True, kw_only=True)
class Noise:
    """Settings of the noise that is added to a step's latents."""

    noise_offset: float = setting(
        0.0,
        "Add to each channel of the noise this number times a random value of its own, the same for the whole image, "
        "so that very dark and very bright images can be learned; 0 disables it.",
        min=0.0,
        max=1.0,
        advanced=True,
    )

    def draw(self, shape: torch.Size, generator: Generator) -> Tensor:
        """Draw noise for latents `[B, 4, h, w]`; with an offset `o`, `n + o * m` with `m` of `[B, 4, 1, 1]`."""
        noise = torch.randn(shape, generator=generator)
        if self.noise_offset:
            noise += self.noise_offset * torch.randn((*shape[:2], 1, 1), generator=generator)
        return noise


@dataclass(frozen=True, kw_only=True)
class StepInputs:
    """Batch, noise and timesteps of one step, or this device's share of them."""

    batch: Batch
    noise: Tensor  # [B, 4, h, w]
    timesteps: Tensor  # [B]
    of: int  # samples of the whole batch

    def map(self, function: Callable[[Tensor], Tensor]) -> "StepInputs":
        """Return the inputs with `function` applied to every tensor."""
        noise, timesteps = function(self.noise), function(self.timesteps)
        return StepInputs(batch=self.batch.map(function), noise=noise, timesteps=timesteps, of=self.of)

    def tensors(self) -> list[Tensor]:
        """Return all tensors, in a fixed order."""
        found: list[Tensor] = []

        def noted(tensor: Tensor) -> Tensor:
            found.append(tensor)
            return tensor

        self.map(noted)
        return found

    def split(self, parts: int) -> list["StepInputs"]:
        """Split into `parts` shares."""
        return [self.map(partial(share, parts=parts, i=i)) for i in range(parts)]


class Ahead:
    """A stage's inputs, step by step; the next ones can be drawn while the device is still at work.

    Between two steps the generator's state is what it would be without that, so that a checkpoint, other draws and an
    early end are unaffected.

    Args:
        draw: draws the next batch, noise and timesteps; its only state is the generator.
        place: copies a tensor to the device.
    """

    def __init__(self, draw: Callable[[], StepInputs], generator: Generator, place: Callable[[Tensor], Tensor]):
        self.draw, self.generator, self.place = draw, generator, place
        self.next: tuple[StepInputs, Tensor] | None = None

    def take(self) -> StepInputs:
        """Return the inputs of the step that begins, and advance the generator past them."""
        inputs, after = self.next or self._drawn()
        self.next = None
        self.generator.set_state(after)
        return inputs

    def prepare(self) -> None:
        """Draw the inputs of the following step; the device copies them when it has finished this one."""
        before = self.generator.get_state()
        try:
            self.next = self._drawn()
        finally:
            self.generator.set_state(before)

    def _drawn(self) -> tuple[StepInputs, Tensor]:
        inputs = self.draw()
        return inputs.map(self.place), self.generator.get_state()


def placed(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy a tensor to the device, without waiting for it."""
    if device.type != "cuda" or tensor.is_cuda:
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)
