"""A check that a network which was not written for training has right gradients, before anything is trained on it.

Blocks that change their activations in place can give gradients that are silently wrong. The slope of the loss along
the gradient g is |g|^2: central finite differences must agree. It is measured in float32 on one small sample, with the
zeros that a LoRA begins with, and the small scales of a T-LoRA, replaced.
"""

from collections.abc import Sequence

import torch
from torch import Generator, Tensor, nn

from .diffusion import Models
from .flow import FlowModels

SIDE = 8  # of the sample's latents
CHANGE = 1e-3  # share of the loss by which a finite difference changes it
TOLERANCE = 5e-3  # relative; right gradients of small models differ by less than 1e-3


def reached(models: Models, params: Sequence[nn.Parameter], prompt: str) -> list[nn.Parameter]:
    """Return those of `params` that the network's output depends on, once their gradient is known to be right.

    Models whose modules were written for training, those of Stable Diffusion, are not checked.

    Raises:
        ValueError: the gradient is wrong.
    """
    if not isinstance(models, FlowModels):
        return [*params]
    before = [parameter.detach().clone() for parameter in params]
    generator = Generator().manual_seed(0)
    loss = Loss(models, prompt, generator)
    models.network.place(torch.float32)
    try:
        for parameter in params:
            parameter.requires_grad_(True)
        move(params, generator)
        found, gradients = _gradients(models, loss, params)
        idle = [parameter for parameter, gradient in zip(params, gradients, strict=True) if gradient is None]
        measured = slope(loss, found, params, gradients)
    finally:
        for parameter, value in zip(params, before, strict=True):
            parameter.data.copy_(value)
            parameter.grad = None
        models.network.place(models.precision)
    square = sum(gradient.double().square().sum().item() for gradient in gradients if gradient is not None)
    if not abs(measured - square) <= TOLERANCE * square:
        raise _wrong(models.family.name, f"a slope of {square:.3g} measured as {measured:.3g}")
    return [parameter for parameter in params if all(parameter is not other for other in idle)]


@torch.no_grad()
def move(params: Sequence[nn.Parameter], generator: Generator) -> None:
    """Replace each B of zeros `[out, rank]`, or S, behind its A `[rank, in]`: `B S A x` becomes about as long as x."""
    for first, second in zip(params, params[1:], strict=False):
        if second.ndim == 1:  # between an A and a B that are orthonormal
            second.fill_((first.shape[1] / first.shape[0]) ** 0.5)
        elif not second.any():
            std = (second.shape[1] / first.shape[1]) ** 0.5
            second.copy_(std * torch.randn(second.shape, generator=generator))


class Loss:
    """The denoising loss of one sample with fixed noise."""

    def __init__(self, models: FlowModels, prompt: str, generator: Generator):
        self.models = models
        shape = 1, models.channels, SIDE, SIDE
        self.latents, self.noise = (torch.randn(shape, generator=generator).to(models.device) for _ in range(2))
        self.timesteps = torch.tensor([len(models.sigmas) // 2], device=models.device)
        self.encoding = models.encode_prompts([prompt])

    def __call__(self) -> Tensor:
        noisy = self.models.add_noise(self.latents, self.noise, self.timesteps)
        prediction = self.models.predict(noisy, self.timesteps, self.encoding)
        return (prediction - self.models.target(self.latents, self.noise, self.timesteps)).square().mean()


def _gradients(
    models: FlowModels, loss: Loss, params: Sequence[nn.Parameter]
) -> tuple[float, tuple[Tensor | None, ...]]:
    """Return the loss and its gradients; notes where the network changes in place what its backward pass needs."""
    value = loss()
    try:
        return value.item(), torch.autograd.grad(value, params, allow_unused=True)
    except RuntimeError as error:
        if models.in_place or "inplace operation" not in str(error):
            raise
    models.in_place = True
    again = loss()
    if not torch.allclose(again, value, rtol=1e-4):  # an operation in place whose result is not assigned
        raise _wrong(models.family.name, "what it computes changes without operations in place")
    return again.item(), torch.autograd.grad(again, params, allow_unused=True)


def _wrong(family: str, reason: str) -> ValueError:
    return ValueError(
        f"The gradients of {family} are wrong in this ComfyUI ({reason}), so nothing is trained: update ComfyUI, or "
        "use another family of models."
    )


@torch.no_grad()
def slope(loss: Loss, value: float, params: Sequence[nn.Parameter], gradients: Sequence[Tensor | None]) -> float:
    """Return the loss's slope along its gradient by central finite differences; unused parameters move, too."""
    square = sum(gradient.square().sum().item() for gradient in gradients if gradient is not None)
    step = CHANGE * value / max(square, 1e-30)
    ends = []
    for sign in (1, -2):
        for parameter, gradient in zip(params, gradients, strict=True):
            parameter.data += sign * step * (torch.ones_like(parameter) if gradient is None else gradient)
        ends.append(loss().double().item())
    return (ends[0] - ends[1]) / (2 * step)
