"""T-LoRA's layers: a LoRA whose rank falls with the noise, from orthogonal factors that add nothing at the start.

T-LoRA, arXiv 2507.05964:

    y = W x + B S M_t A x - B0 S0 M_t A0 x,    M_t = diag(1 for the first r(t) of r, 0 for the others)
    r(t) = floor((T - t) / T * (r - r_min)) + r_min

A, S and B train; A0, S0 and B0 are their initial values. In flow matching the noise level s, with the family's shift in
it, takes the place of t / T: r(s) = floor((1 - s) (r - r_min)) + r_min.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from .diffusion import Models
from .flow import FlowModels, Network, is_linear

TIMESTEPS = 1000


@dataclass(frozen=True, kw_only=True)
class RankSchedule:
    """Ranks that act at each timestep: all of them on a clean image, `min_rank` in noise."""

    rank: int
    min_rank: int

    @classmethod
    def read(cls, ranks: tuple[int, ...]) -> "RankSchedule":
        """Return the schedule of a file's two numbers, rank and minimum rank.

        Raises:
            ValueError: they are none.
        """
        rank, min_rank = ranks
        if not 0 < min_rank <= rank:
            raise ValueError("The ranks of this T-LoRA are not 0 < min_rank <= rank: save the result again.")
        return cls(rank=rank, min_rank=min_rank)

    def active(self) -> Tensor:
        """Return `r(t)` of every timestep, `[T]`."""
        spare = self.rank - self.min_rank
        ranks = [int((TIMESTEPS - t) / TIMESTEPS * spare) + self.min_rank for t in range(TIMESTEPS)]
        return torch.tensor(ranks)

    def masks(self) -> Tensor:
        """Return `M_t` of every timestep for a layer and its initial values behind it, `[T, 2 rank]`."""
        return self._masks(self.active())

    def masks_at(self, sigmas: Tensor) -> Tensor:
        """Return `M_s` of noise levels `[n]` in 0..1 of flow matching, `[n, 2 rank]` as above."""
        return self._masks(((1 - sigmas.double()) * (self.rank - self.min_rank)).long() + self.min_rank)

    def _masks(self, active: Tensor) -> Tensor:
        return (torch.arange(self.rank, device=active.device) < active[:, None]).repeat(1, 2).float()


@dataclass(kw_only=True)
class CurrentMask:
    """The masks of a U-Net's current samples; its T-LoRA layers share it."""

    schedule: RankSchedule
    mask: Tensor | None = None  # [n, 2 rank]
    tables: dict[torch.device, Tensor] = field(default_factory=dict)  # the schedule's masks, brought there once

    def follow(self, unet: nn.Module) -> None:
        """Let a diffusers U-Net set the mask at each of its calls."""
        unet.register_forward_pre_hook(self._before, with_kwargs=True)

    def _before(self, unet: nn.Module, args: tuple, kwargs: dict) -> None:
        timesteps = torch.as_tensor(kwargs["timestep"]).reshape(-1)
        if timesteps.device not in self.tables:
            self.tables[timesteps.device] = self.schedule.masks().to(timesteps.device)
        self.mask = self.tables[timesteps.device][timesteps.long()]

    def like(self, x: Tensor) -> Tensor:
        """Return the masks for a layer's inputs `[n, ..., d]`, in their precision, `[n, 1..., 2 rank]`."""
        assert self.mask is not None  # the U-Net's call begins by setting it
        return self.mask.view(-1, *(1 for _ in x.shape[1:-1]), self.mask.shape[1]).to(x)


@dataclass(kw_only=True)
class CurrentFlowMask(CurrentMask):
    """The masks of a transformer's current samples, by its network's noise levels."""

    network: Network
    levels: Tensor | None = None  # whose masks these are

    def like(self, x: Tensor) -> Tensor:
        """Return the masks for a layer's inputs."""
        if self.levels is not self.network.levels:
            self.levels = self.network.levels
            self.mask = self.schedule.masks_at(self.levels)
        return super().like(x)


def _current(models: Models, schedule: RankSchedule) -> CurrentMask:
    """Return the masks that follow what these models compute."""
    if isinstance(models, FlowModels):
        return CurrentFlowMask(schedule=schedule, network=models.network)
    current = CurrentMask(schedule=schedule)
    current.follow(models.unet)
    return current


class TimestepLoRA(nn.Module):
    """A frozen linear layer with its T-LoRA.

    Args:
        down, scale, up: the initial A `[r, in]`, S `[r]` and B `[out, r]`.
    """

    def __init__(self, base: nn.Module, current: CurrentMask, down: Tensor, scale: Tensor, up: Tensor):
        super().__init__()
        self.base_layer, self.current = base, current  # peft's name
        self.lora_down, self.lora_scale, self.lora_up = (nn.Parameter(part.clone()) for part in (down, scale, up))
        self.initial_down: Tensor
        self.initial_up: Tensor  # B0 S0
        self.register_buffer("initial_down", down, persistent=False)
        self.register_buffer("initial_up", up * scale, persistent=False)

    def factors(self) -> tuple[Tensor, Tensor]:
        """Return what is added at full rank as one LoRA of rank `2 r`: A `[2 r, in]` and B `[out, 2 r]`."""
        down = torch.cat([self.lora_down, self.initial_down.to(self.lora_down)])
        return down, torch.cat([self.lora_up * self.lora_scale, -self.initial_up.to(self.lora_up)], dim=1)

    def forward(self, x: Tensor) -> Tensor:
        down, up = self.factors()
        return self.base_layer(x) + F.linear(F.linear(x, down.to(x)) * self.current.like(x), up.to(x))


def add_timestep_lora(
    models: Models, targets: list[str], schedule: RankSchedule, generator: Generator
) -> list[nn.Parameter]:
    """Add T-LoRA to every linear layer of a U-Net or a transformer whose name ends with one of `targets`.

    The initial factors are the last `rank` of a singular value decomposition of a matrix `normal(0, 1 / rank)`. Its
    singular vectors are independent of its singular values, and any orthonormal ones are equally likely: so they are
    drawn as such, and the values once per shape, which is the same distribution in a small part of the time.

    Returns:
        A, S and B of each layer.

    Raises:
        ValueError: a layer is narrower than the rank.
    """
    current, values, added = _current(models, schedule), {}, []
    for name, layer in [*models.unet.named_modules()]:
        if not (is_linear(layer) and f".{name}".endswith(tuple(f".{target}" for target in targets))):
            continue
        shape, rank = (layer.out_features, layer.in_features), schedule.rank
        if rank > min(shape):
            raise ValueError(f"The LoRA rank {rank} is more than the width of a layer: use {min(shape)} or less.")
        if shape not in values:
            values[shape] = torch.linalg.svdvals(torch.randn(shape, generator=generator) / rank)[-rank:]
        down = orthonormal(shape[1], rank, generator).T.contiguous()
        added.append(_put(models.unet, name, current, down, values[shape], orthonormal(shape[0], rank, generator)))
    return [parameter for layer in added for parameter in (layer.lora_down, layer.lora_scale, layer.lora_up)]


def restore_timestep_lora(models: Models, schedule: RankSchedule, factors: Mapping[str, Sequence[Tensor]]) -> None:
    """Add T-LoRA whose `factors()` are these, by the layer's path."""
    current, rank = _current(models, schedule), schedule.rank
    for path, (down, up) in factors.items():
        one = torch.ones(rank, device=up.device)
        layer = _put(models.unet, path, current, down[rank:].contiguous(), one, -up[:, rank:].contiguous())
        layer.lora_down.data.copy_(down[:rank])
        layer.lora_up.data.copy_(up[:, :rank])


def schedule_of(unet: nn.Module) -> RankSchedule | None:
    """Return the schedule of a U-Net's T-LoRA, `None` where it has none."""
    return next((layer.current.schedule for layer in unet.modules() if isinstance(layer, TimestepLoRA)), None)


def orthonormal(length: int, columns: int, generator: Generator) -> Tensor:
    """Draw `[length, columns]` with orthonormal columns, all directions equally likely."""
    q, r = torch.linalg.qr(torch.randn(length, columns, generator=generator))
    return q * r.diagonal().sign()  # without it, the directions depend on the algorithm


def _put(unet, path: str, current: CurrentMask, down: Tensor, scale: Tensor, up: Tensor) -> TimestepLoRA:
    base = unet.get_submodule(path)
    device = base.weight.device
    layer = TimestepLoRA(base, current, down.to(device), scale.to(device), up.to(device))
    parent, _, name = path.rpartition(".")
    setattr(unet.get_submodule(parent), name, layer)
    return layer
