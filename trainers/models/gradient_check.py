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
    for parameter in params:
        parameter.requires_grad_(True)
    checkpointing, models.in_place = models.checkpointing, False
    try:
        ways = (True,) if _changes_in_place(loss) else (False, True)
        models.network.place(torch.float32)
        move(params, generator)
        gradients = _right_gradients(loss, params, ways)
    finally:
        for parameter, value in zip(params, before, strict=True):
            parameter.data.copy_(value)
            parameter.grad = None
        models.save_memory(checkpointing)
        models.network.place(models.precision)
    idle = [parameter for parameter, gradient in zip(params, gradients, strict=True) if gradient is None]
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


def _changes_in_place(loss: Loss) -> bool:
    """Return whether the network changes in place what its backward pass needs, as autograd itself would notice.

    Copies of weights in another precision, which nothing changes, are let go.
    """
    weights = {parameter.shape for parameter in loss.models.unet.parameters()}
    kept: list[tuple[Tensor, int]] = []

    def pack(tensor: Tensor) -> None:
        if not {tensor.shape, tensor.shape[::-1]} & weights:
            kept.append((tensor, tensor._version))

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda nothing: nothing):
        loss()
    changed = any(tensor._version != version for tensor, version in kept)
    kept.clear()  # the graph holds `pack`, and this the graph: Python does not see that ring
    return changed


def _right_gradients(loss: Loss, params: Sequence[nn.Parameter], ways: Sequence[bool]) -> Sequence[Tensor | None]:
    """Return the loss's gradients, with the first value of `in_place` that gives right ones; it is kept.

    Gradient checkpointing holds one block's weights in float32 at a time.

    Raises:
        ValueError: none gives right ones.
    """
    models = loss.models
    with torch.no_grad():
        value = loss()
    for models.in_place in ways:
        models.save_memory(True)  # of blocks that know how
        again = loss()
        if not torch.allclose(again, value, rtol=1e-4):  # an operation in place whose result is not assigned
            raise _wrong(models.family.name, "what it computes changes without operations in place")
        try:
            gradients = torch.autograd.grad(again, params, allow_unused=True)
        except RuntimeError as error:
            if "inplace operation" not in str(error):
                raise
            reason = "it changes in place what its backward pass needs"
            continue
        measured = slope(loss, again.item(), params, gradients)
        square = sum(gradient.double().square().sum().item() for gradient in gradients if gradient is not None)
        if abs(measured - square) <= TOLERANCE * square:
            return gradients
        reason = f"a slope of {square:.3g} measured as {measured:.3g}"
    raise _wrong(models.family.name, reason)


def _wrong(family: str, reason: str) -> ValueError:
    return ValueError(
        f"The gradients of {family} are wrong in this ComfyUI ({reason}), so nothing is trained: update ComfyUI, or "
        "use another family of models."
    )


@torch.no_grad()
def slope(loss: Loss, value: float, params: Sequence[nn.Parameter], gradients: Sequence[Tensor | None]) -> float:
    """Return the loss's slope along its gradient by central finite differences; unused parameters move, too.

    They are all put back.
    """
    square = sum(gradient.square().sum().item() for gradient in gradients if gradient is not None)
    step = CHANGE * value / max(square, 1e-30)

    def moved(change: float) -> float:
        for parameter, gradient in zip(params, gradients, strict=True):
            parameter.data += change * (torch.ones_like(parameter) if gradient is None else gradient)
        return loss().double().item()

    ahead, behind = moved(step), moved(-2 * step)
    moved(step)
    return (ahead - behind) / (2 * step)
