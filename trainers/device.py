"""One device, the rule for a training's precision, and the recognition of out-of-memory errors."""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import ClassVar, Protocol, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")
PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
TOO_LARGE = (
    "Memory ran out even with one image at a time: lower the resolution in Load References, or close other programs."
)
# Besides torch's own class: what CUDA, its libraries, ROCm, XPU, MPS, DirectML and the processor's allocator say.
OUT_OF_MEMORY = (
    "out of memory", "out_of_memory", "alloc_failed", "allocation_failed", "allocate memory", "allocate tensor",
    "not enough memory", "not enough gpu video memory", "out_of_device_memory", "out_of_host_memory",
    "out_of_resources",
)  # fmt: skip
ACCELERATOR_ERROR = getattr(torch, "AcceleratorError", ())  # younger than the oldest torch that hosts still run
CUDNN_PAYS = 500  # steps, see SingleDevice.attention
# Parts of the names of cards of capability 7.5 without tensor cores, whose float16 gives NaN.
BROKEN_HALF = ("GTX 16", "MX450", "MX550", "T500", "T550", "T600", "T1000", "T1200", "T2000", "CMP 30HX")
NO_AUTOCAST = (
    "Training does not run on DirectML, which has no mixed precision: install a torch for your card (CUDA, ROCm or "
    "XPU), or start ComfyUI with --cpu."
)


class Shared(Protocol):
    """What processes can share: `data.batch.Batch`."""

    def __len__(self) -> int: ...

    def split(self: "B", parts: int) -> list["B"]: ...


B = TypeVar("B", bound=Shared)


@dataclass(kw_only=True)
class SingleDevice:
    """One device and its precision: the few calls the loop makes, as Accelerate offers them for many devices."""

    device: torch.device
    dtype: torch.dtype = torch.float32
    graph: bool = True  # on a card, launch forward and backward at once instead of kernel by kernel
    scaler: torch.amp.GradScaler = field(init=False)
    alone: ClassVar[bool] = True  # no other process works on the same training

    def __post_init__(self):
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.dtype == torch.float16)

    @property
    def captures(self) -> bool:
        """Whether passes are captured as CUDA graphs."""
        return self.graph and self.alone and self.device.type == "cuda"

    def autocast(self) -> contextlib.AbstractContextManager:
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    @contextlib.contextmanager
    def attention(self, steps: int) -> Iterator[None]:
        """Leave cuDNN's attention out of a training of few steps, while the block lasts.

        cuDNN builds it at run time for every shape. SD 1.5 on an H200: 9.1 s at the first time ever, 1.5 s in every
        later process; a step then takes 67.8 ms instead of 76.4 ms.
        """
        before = torch.backends.cuda.cudnn_sdp_enabled()
        torch.backends.cuda.enable_cudnn_sdp(before and steps >= CUDNN_PAYS)
        try:
            yield
        finally:
            torch.backends.cuda.enable_cudnn_sdp(before)

    def share(self, batch: B, noise: Tensor, timesteps: Tensor) -> tuple[B, Tensor, Tensor]:
        """Return this device's share of a batch, its noise and its timesteps."""
        return batch, noise, timesteps

    def total(self, sums: dict[str, Tensor]) -> dict[str, float]:
        """Return the sums over all devices."""
        return dict(zip(sums, torch.stack([*sums.values()]).tolist(), strict=True))

    def agreed(self, found: T) -> T:
        """Return what all devices use where each has computed it; a value that JSON can hold."""
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
    """Return whether an error says that memory ran out, in any library's words."""
    if isinstance(error, (MemoryError, torch.cuda.OutOfMemoryError)):
        return True
    said = isinstance(error, RuntimeError) and any(words in str(error).lower() for words in OUT_OF_MEMORY)
    if said and isinstance(error, ACCELERATOR_ERROR):
        _take_what_is_reported_late()
    return said


def _take_what_is_reported_late() -> None:
    """Consume the error that CUDA reports once more, at the next call."""
    with contextlib.suppress(RuntimeError, AssertionError):  # the latter where torch has no CUDA
        torch.ones(1, device="cuda").add_(1)
        torch.cuda.synchronize()


def has_bfloat16(device: torch.device) -> bool:
    """Return whether the device computes in bfloat16 natively."""
    return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)


def has_float16(device: torch.device) -> bool:
    """Return whether float16 works on the device and is faster than float32."""
    if device.type != "cuda":
        return False
    properties = torch.cuda.get_device_properties(device)
    return bool(torch.version.hip) or works_in_half(properties.name, properties.major)


def works_in_half(name: str, major: int) -> bool:
    """Return whether an NVIDIA card works in float16, by its name and its compute capability's first number."""
    return major >= 7 and not any(part in name for part in BROKEN_HALF)


def training_dtype(
    name: str,
    device: torch.device,
    has_bfloat16: Callable[[torch.device], bool] = has_bfloat16,
    has_float16: Callable[[torch.device], bool] = has_float16,
) -> torch.dtype:
    """Return the precision called `name`; for "auto" bfloat16 where the device has it, else float16, else float32.

    Raises:
        ValueError: nothing can be trained on this device.
    """
    if device.type == "privateuseone":
        raise ValueError(NO_AUTOCAST)
    if name != "auto":
        return PRECISIONS[name]
    if has_bfloat16(device):
        return torch.bfloat16
    return torch.float16 if has_float16(device) else torch.float32
