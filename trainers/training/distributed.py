"""One training on several devices, a process each, as `torchrun` and `accelerate launch` start them.

Every process reads the same models and draws the same batches, noise and timesteps; each computes its share of a
batch, and the gradients of the shares add up to those of the whole, as those of a batch that is split on one device do.
So the result is that of one device up to rounding. Only the first process writes.
"""

import contextlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.distributed as dist
from torch import Tensor

from ..device import B, SingleDevice, T


def launched() -> bool:
    """Return whether this process is one of several of the same training."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


@contextlib.contextmanager
def processes(device: torch.device) -> Iterator[torch.device]:
    """Join the group of processes, and yield the device of this one: its own card where the device is one."""
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    # Both: gradients lie where they are computed, what is agreed on lies on the CPU.
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    try:
        yield device
    finally:
        dist.destroy_process_group()


@dataclass(kw_only=True)
class ManyDevices(SingleDevice):
    """A process's device and its communication with the others. All processes make the same calls."""

    alone: ClassVar[bool] = False

    def share(self, batch: B, noise: Tensor, timesteps: Tensor) -> tuple[B, Tensor, Tensor]:
        rank, size = dist.get_rank(), dist.get_world_size()
        if len(batch) < size:
            raise ValueError(
                f"The batch of {len(batch)} images cannot be shared by {size} processes: start at most "
                f"{len(batch)}, or raise the batch size."
            )
        return batch.split(size)[rank], noise.tensor_split(size)[rank], timesteps.tensor_split(size)[rank]

    def total(self, sums: dict[str, Tensor]) -> dict[str, float]:
        added = torch.stack([torch.as_tensor(value, dtype=torch.float32).cpu() for value in sums.values()])
        dist.all_reduce(added)
        return dict(zip(sums, added.tolist(), strict=True))

    def agreed(self, found: T) -> T:
        """Return the first process's value: measurements of two cards may differ in their last digits."""
        data = torch.frombuffer(bytearray(json.dumps(found).encode()), dtype=torch.uint8)
        length = torch.tensor(len(data))
        dist.broadcast(length, src=0)
        data = data if dist.get_rank() == 0 else data.new_empty(int(length))
        dist.broadcast(data, src=0)
        return json.loads(data.numpy().tobytes())

    def step(self, optimizer: torch.optim.Optimizer) -> None:
        """Add up the gradients of all shares; what follows is then the same everywhere."""
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        for work in [dist.all_reduce(gradient, async_op=True) for gradient in gradients]:
            work.wait()
        super().step(optimizer)
