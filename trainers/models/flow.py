"""Transformers of flow matching that are not rebuilt here: whoever starts a training hands over the module that runs.

Flow matching (arXiv 2210.02747), rectified as in arXiv 2403.03206: `x_t = (1 - s) x + s e` with a noise level s in
0..1, and the network predicts `e - x`. Noise levels are those of a table, as the timesteps of Stable Diffusion are, so
that the loop, the losses and the monitors are the same. Text encoders do not train and are not seen here: a prompt is
known by its number, in the place of ids.
"""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

from .diffusion import Encoding, Models

IN_PLACE = {"add_": "add", "sub_": "sub", "mul_": "mul", "div_": "div"}  # what `+=` and its like call


class Network(Protocol):
    """A transformer at work, with its text encoders and its sampler.

    Attributes:
        levels: noise levels `[n]` of the samples that are in the network, or were last.
    """

    levels: Tensor

    def encode(self, prompts: Sequence[str]) -> None:
        """Encode prompts, without gradient; each is encoded once."""

    def velocity(self, noisy_latents: Tensor, sigmas: Tensor, prompts: Sequence[str]) -> Tensor:
        """Return the prediction of `e - x`, `[n, c, h, w]`, for latents, noise levels `[n]` and n prompts."""

    def place(self, dtype: torch.dtype) -> None:
        """Load the weights onto the device, to compute in this precision."""

    def generate(
        self, prompts: Sequence[str], seeds: Sequence[int], *, size: tuple[int, int], steps: int, guidance: float
    ) -> Tensor:
        """Return images `[n, 3, *size]` in 0..1 on the CPU, one per prompt and seed."""


@dataclass(kw_only=True)
class FlowModels(Models):
    """A transformer of flow matching: `unet` is its module, `alphas_cumprod` has the ratios of signal to noise.

    Attributes:
        sigmas: noise levels `[T]`, rising, with the family's shift in them.
        channels: of the latents.
        in_place: whether the network changes tensors in place that its backward pass needs; found by gradient_check.py.
        prompts: those that were tokenized so far; ids are their places in this list.
    """

    sigmas: Tensor
    channels: int
    network: Network
    in_place: bool = False
    prompts: list[str] = field(default_factory=list)
    checkpointed: bool = False

    def __post_init__(self):
        self.precision = torch.float32  # until `to`: weights in float8 are computed in another

    def to(self, device: torch.device | str, unet_dtype: torch.dtype) -> "FlowModels":
        """Load the network, which knows its device, to compute in a precision."""
        self.precision = unet_dtype
        self.network.place(unet_dtype)
        return self

    @contextlib.contextmanager
    def unet_aside(self) -> Iterator[None]:
        """Do nothing: whoever loaded the network makes room where something else needs it."""
        yield

    @property
    def checkpointing(self) -> bool:
        """Whether gradient checkpointing is on."""
        return self.checkpointed

    def save_memory(self, checkpointing: bool) -> None:
        """Turn gradient checkpointing of every block on or off."""
        self.checkpointed = checkpointing
        for block in blocks(self.unet):
            vars(block).pop("forward", None)
            if checkpointing:
                # of this module alone
                block.forward = _Checkpointed(block, self.in_place, self.network)  # type: ignore[method-assign]

    def tokenize(self, prompts: Sequence[str]) -> Tensor:
        """Return the numbers of prompts, `[len(prompts), 1, 1]`; new ones are encoded."""
        if new := [prompt for prompt in dict.fromkeys(prompts) if prompt not in self.prompts]:
            self.network.encode(new)
            self.prompts += new
        return torch.tensor([[[self.prompts.index(prompt)]] for prompt in prompts])

    def encode_ids(self, input_ids: Tensor) -> Encoding:
        """Return the prompts' numbers `[n, 1]` as their encoding: what belongs to a number is the network's."""
        return Encoding(parts=(input_ids[:, 0],))

    def prompts_of(self, input_ids: Tensor) -> list[str]:
        """Return the prompts of numbers `[n, ...]`."""
        return [self.prompts[number] for number in input_ids.flatten().tolist()]

    def predict(self, noisy_latents: Tensor, timesteps: Tensor, encoding: Encoding) -> Tensor:
        """Return the network's prediction of `e - x`, `[n, c, h, w]`."""
        with computing(self.in_place):
            return self.network.velocity(noisy_latents, self._levels(timesteps), self.prompts_of(encoding.parts[0]))

    def _levels(self, timesteps: Tensor) -> Tensor:
        return self.sigmas.to(timesteps.device)[timesteps]

    def add_noise(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Return `(1 - s) x + s e`, `[n, c, h, w]`."""
        return torch.lerp(latents, noise, self._levels(timesteps).view(-1, 1, 1, 1).to(latents))

    def target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Return the target of the prediction, `e - x`."""
        return noise - latents


def alphas_of(sigmas: Tensor) -> Tensor:
    """Return cumulative alphas `[T]` with the signal-to-noise ratios of a flow: `a / (1 - a) = ((1 - s) / s)^2`."""
    signal, noise = (1 - sigmas.double()).square(), sigmas.double().square()
    return (signal / (signal + noise)).float()


def blocks(network: nn.Module) -> list[nn.Module]:
    """Return the modules in the lists of a transformer: the blocks that follow one another."""
    return [block for part in network.children() if isinstance(part, nn.ModuleList) for block in part]


def is_linear(layer: nn.Module) -> bool:
    """Return whether a module is a linear layer, also one of the host's that holds its weight in another format."""
    own = hasattr(layer, "in_features") and hasattr(layer, "out_features") and not hasattr(layer, "base_layer")
    return isinstance(layer, nn.Linear) or own


def computing(in_place: bool) -> contextlib.AbstractContextManager:
    """Return a context for a forward pass; with `in_place`, for a network that changes activations it needs later."""
    return _OutOfPlace() if in_place else contextlib.nullcontext()


class _OutOfPlace(TorchFunctionMode):
    """Lets `x += y` and its like give a new tensor, so that what autograd has kept of x stays."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        return getattr(torch.Tensor, IN_PLACE.get(function.__name__, ""), function)(*args, **(kwargs or {}))


class _Checkpointed:
    """A block's forward pass with gradient checkpointing.

    Some blocks change their inputs in place: they get copies, so that the second pass begins with what the first did.
    By then other samples may have been in the network: its noise levels are brought back, too.
    """

    def __init__(self, block: nn.Module, in_place: bool, network: Network):
        self.run, self.in_place, self.network = type(block).forward.__get__(block), in_place, network

    def __call__(self, *args, **kwargs):
        # All by position: PyTorch shows those alone to whoever counts what is kept.
        return checkpoint(
            self._copied, self.network.levels, tuple(kwargs), *args, *kwargs.values(), use_reentrant=False
        )

    def _copied(self, levels: Tensor, names: tuple[str, ...], *given):
        self.network.levels = levels
        values = [*map(_copy, given)]
        first = len(values) - len(names)
        with computing(self.in_place):
            return self.run(*values[:first], **dict(zip(names, values[first:], strict=True)))


def _copy(value):
    return value.clone() if isinstance(value, Tensor) else value
