"""One device and its precision, and what an exhausted memory looks like."""

import contextlib
from dataclasses import dataclass, field
from typing import ClassVar, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")
PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
TOO_LARGE = "Memory ran out even picture by picture: lower the resolution in Load References, or close other programs."


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

    def share(self, *whole: T) -> tuple[T, ...]:
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


def is_out_of_memory(error: BaseException) -> bool:
    return isinstance(error, (MemoryError, torch.cuda.OutOfMemoryError)) or "allocate memory" in str(error)


def precision(name: str, device: torch.device) -> torch.dtype:
    """The dtype to compute in; "auto": bfloat16 where the device has it, else float16 on a GPU, else float32."""
    if name != "auto":
        return PRECISIONS[name]
    if device.type != "cuda":
        return torch.float32
    return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
