"""Adds learned weights in full precision at every use instead of merging them into half-precision weights.

The exception is modules so small, such as norms, that the host always merges them.
"""

import comfy.model_management as mm
import torch
from torch import Tensor

from ...trainers.models.families import FLOW_FAMILIES
from ...trainers.models.timestep_lora import RankSchedule
from . import internals, models

SMALL = 16 * 1024  # bytes, as in the host


KEY = "personalize ranks"


class CurrentMask:
    """Holds which ranks of a T-LoRA act at the noise that a MODEL computes. All samples of a call have the same."""

    def __init__(self, schedule: RankSchedule):
        self.schedule, self.masks = schedule, schedule.masks()  # [T, 2 rank]
        self.mask = self.masks[0]

    def follow(self, patcher) -> None:
        """Let a MODEL set the mask: from its timestep, or by flow matching from its noise level."""
        kinds = internals.WrappersMP
        if models.family_of(patcher) in FLOW_FAMILIES:
            patcher.add_wrapper_with_key(kinds.APPLY_MODEL, KEY, self._at_level)
        else:
            patcher.add_wrapper_with_key(kinds.DIFFUSION_MODEL, KEY, self._at_timestep)

    def _at_timestep(self, executor, x, timesteps, *args, **kwargs):
        self.masks = self.masks.to(timesteps.device)
        self.mask = self.masks[timesteps[0].round().long()]
        return executor(x, timesteps, *args, **kwargs)

    def _at_level(self, executor, x, sigmas, *args, **kwargs):
        (self.mask,) = self.schedule.masks_at(sigmas[:1])
        return executor(x, sigmas, *args, **kwargs)


class LowRank:
    """Adds `scale * up @ down` to a weight whenever the host casts it for use; of a T-LoRA the ranks that act."""

    def __init__(self, up: Tensor, down: Tensor, scale: float, current: CurrentMask | None = None):
        self.up, self.down, self.scale, self.current = up, down, scale, current

    def __call__(self, weight: Tensor) -> Tensor:
        up, down = (part.to(weight.device, torch.float32).flatten(1) for part in (self.up, self.down))
        if self.current:
            up = up * self.current.mask.to(up)
        return weight + (self.scale * up @ down).view(weight.shape).to(weight.dtype)

    def move_to(self, device: torch.device) -> int:
        """Move the tensors with the model; return the number of bytes. The host calls this."""
        self.up, self.down = self.up.to(device), self.down.to(device)
        return self.up.nbytes + self.down.nbytes


class Difference:
    """Adds `scale * difference` to a weight or a bias whenever the host casts it for use."""

    def __init__(self, difference: Tensor, scale: float):
        self.difference, self.scale = difference, scale

    def __call__(self, weight: Tensor) -> Tensor:
        return weight + (self.scale * self.difference.to(weight.device, torch.float32)).to(weight.dtype)

    def move_to(self, device: torch.device) -> int:
        """Move the tensors with the model; return the number of bytes. The host calls this."""
        self.difference = self.difference.to(device)
        return self.difference.nbytes


def add(
    patcher, lora: dict[str, Tensor], keys: dict[str, str], strength: float, schedule: RankSchedule | None = None
) -> int:
    """Add the layers of a kohya LoRA that belong to this patcher; return their number.

    Args:
        keys: name of a layer in the file -> the host's name of the weight.
        schedule: of a T-LoRA, whose ranks depend on the timestep.
    """
    current = CurrentMask(schedule) if schedule else None
    if current:
        current.follow(patcher)
    parts = [key.split(".", 1) for key in sorted(lora)]
    parts = [(name, part) for name, part in parts if name in keys and part in ("lora_up.weight", "diff", "diff_b")]
    for name, part in parts:
        weight = keys[name] if part != "diff_b" else bias_of(keys[name])
        _put(patcher, weight, _adding(lora, name, part, strength, current))
    return len(parts)


def _put(patcher, weight: str, adding: LowRank | Difference) -> None:
    if _is_merged_anyway(patcher, weight):
        shape = patcher.model.get_parameter(weight).shape
        patcher.add_patches({weight: ("diff", (adding(torch.zeros(shape)),))}, 1.0)
    else:
        patcher.add_weight_wrapper(weight, adding)


def _is_merged_anyway(patcher, weight: str) -> bool:
    """Return whether the host, with dynamic VRAM, loads this weight's module at once and skips its wrappers."""
    if not getattr(patcher, "is_dynamic", lambda: False)():
        return False
    return mm.module_size(patcher.model.get_submodule(weight.rpartition(".")[0])) <= SMALL


def _adding(
    lora: dict[str, Tensor], name: str, part: str, strength: float, current: CurrentMask | None
) -> LowRank | Difference:
    if part != "lora_up.weight":
        return Difference(lora[f"{name}.{part}"], strength)
    up, down = lora[f"{name}.lora_up.weight"], lora[f"{name}.lora_down.weight"]
    return LowRank(up, down, strength * float(lora[f"{name}.alpha"]) / len(down), current)


def bias_of(weight: str) -> str:
    """Return the host's name of the bias that belongs to a weight."""
    return f"{weight.removesuffix('.weight')}.bias"
