"""Checkpoints: the state of a training between two steps, to resume it bit for bit, in memory and as a file."""

import json
import math
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Generator, Tensor

from .. import files
from .optimizers import KEPT


@dataclass(frozen=True, kw_only=True)
class StageState:
    """State of a stage between two steps.

    Besides this only the run's generator has a state: batches, noise and timesteps are all drawn from it.
    """

    step: int
    seconds: float
    params: tuple[Tensor, ...]  # in the order of the stage's parameters
    # The optimizer's state by number of the parameter; its whole numbers as int64 without dimensions. Empty: none.
    optimizer: dict[int, dict[str, Tensor]]
    scaler: dict[str, float]
    generator: Tensor
    groups: tuple[dict[str, float], ...] = ()  # what the optimizer keeps of each group of parameters
    best: tuple[Tensor, ...] = ()  # the parameters to return instead, where a monitor keeps the best so far


def capture(
    step: int,
    seconds: float,
    params: Iterable[Tensor],
    generator: Generator,
    optimizer: torch.optim.Optimizer | None = None,
    scaler: torch.amp.GradScaler | None = None,
) -> StageState:
    """Copy a stage's state to the CPU; without an optimizer, that of one that has not begun or has ended."""
    return StageState(
        step=step,
        seconds=seconds,
        params=tuple(_copied(p) for p in params),
        optimizer=_memory(optimizer) if optimizer else {},
        groups=_groups(optimizer) if optimizer else (),
        scaler=scaler.state_dict() if scaler else {},
        generator=generator.get_state(),
    )


def _memory(optimizer: torch.optim.Optimizer) -> dict[int, dict[str, Tensor]]:
    """Copy the optimizer's state. bitsandbytes counts steps in ints where torch has tensors."""
    numbered = enumerate(p for group in optimizer.param_groups for p in group["params"])
    known = {i: optimizer.state[p] for i, p in numbered if p in optimizer.state}
    return {i: {name: _copied(torch.as_tensor(v)) for name, v in named.items()} for i, named in known.items()}


def _groups(optimizer: torch.optim.Optimizer) -> tuple[dict[str, float], ...]:
    return tuple({name: group[name] for name in KEPT if name in group} for group in optimizer.param_groups)


def _copied(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", copy=True).contiguous()


@torch.no_grad()
def restore(
    state: StageState,
    params: Iterable[Tensor],
    generator: Generator,
    optimizer: torch.optim.Optimizer | None = None,
    scaler: torch.amp.GradScaler | None = None,
) -> None:
    """Restore parameters, generator and, if given, optimizer and scaler to `state`."""
    put(state.params, params)
    generator.set_state(state.generator)
    if optimizer and state.optimizer:
        known = {i: {name: _number(v) for name, v in named.items()} for i, named in state.optimizer.items()}
        begun = optimizer.state_dict()["param_groups"]
        groups = [{**group, **kept} for group, kept in zip(begun, state.groups, strict=True)]
        optimizer.load_state_dict({"state": known, "param_groups": groups})
    if scaler and state.scaler:
        scaler.load_state_dict(state.scaler)


@torch.no_grad()
def put(values: Iterable[Tensor], params: Iterable[Tensor]) -> None:
    """Write values into parameters."""
    for parameter, value in zip(params, values, strict=True):
        parameter.copy_(value)


def _number(value: Tensor) -> Tensor | int:
    return int(value) if value.dtype == torch.int64 and not value.ndim else value


def save(stages: tuple[StageState, ...], path: Path) -> None:
    """Write the states of the stages so far, the last of them the current one."""
    tensors = {}
    for i, stage in enumerate(stages):
        tensors[f"{i}.generator"] = stage.generator
        tensors |= {f"{i}.params.{j}": tensor for j, tensor in enumerate(stage.params)}
        tensors |= {f"{i}.best.{j}": tensor for j, tensor in enumerate(stage.best)}
        tensors |= {f"{i}.optimizer.{j}.{name}": v for j, named in stage.optimizer.items() for name, v in named.items()}
    about = [
        {"step": s.step, "seconds": s.seconds, "scaler": s.scaler, "groups": s.groups, "params": len(s.params)}
        for s in stages
    ]
    metadata = {"stages": json.dumps(about), "checksum": str(_checksum(tensors))}
    with files.replaced(path) as temporary:
        save_file(tensors, temporary, metadata=metadata)


def load(path: Path) -> tuple[StageState, ...] | None:
    """Read what `save` wrote; `None` where the file is damaged."""
    try:
        tensors, metadata = files.tensors(path)
        if metadata["checksum"] != str(_checksum(tensors)):
            return None
        return tuple(_stage(i, entry, tensors) for i, entry in enumerate(json.loads(metadata["stages"])))
    except (OSError, SafetensorError, LookupError, TypeError, ValueError, AttributeError, RecursionError, RuntimeError):
        return None


def fits(state: StageState, params: Iterable[Tensor]) -> bool:
    """Return whether parameters have the shapes of a state's."""
    return [p.shape for p in params] == [p.shape for p in state.params]


def _stage(i: int, about: dict, tensors: dict[str, Tensor]) -> StageState:
    moments: dict[int, dict[str, Tensor]] = {}
    for key in tensors:
        stage, kind, *rest = key.split(".")
        if stage == str(i) and kind == "optimizer":
            moments.setdefault(int(rest[0]), {})[rest[1]] = tensors[key]
    generator, seconds = tensors[f"{i}.generator"], float(about["seconds"])
    if not (type(about["step"]) is int and about["step"] >= 0 and math.isfinite(seconds)):
        raise ValueError("a number of steps or seconds")
    if not (isinstance(about["scaler"], dict) and generator.dtype == torch.uint8):
        raise ValueError("a scaler or a generator")
    if not all(type(number) in (int, float) for group in about["groups"] for number in group.values()):
        raise ValueError("a group of parameters")
    torch.Generator().set_state(generator)
    return StageState(
        step=about["step"],
        seconds=seconds,
        params=tuple(tensors[f"{i}.params.{j}"] for j in range(about["params"])),
        optimizer=moments,
        scaler=about["scaler"],
        generator=generator,
        groups=tuple(about["groups"]),
        best=tuple(tensors[key] for j in range(about["params"]) if (key := f"{i}.best.{j}") in tensors),
    )


def _checksum(tensors: dict[str, Tensor]) -> int:
    """Return CRC-32 over names and bytes, against damage, not against tampering."""
    total = 0
    for name in sorted(tensors):
        total = zlib.crc32(
            tensors[name].contiguous().view(-1).view(torch.uint8).numpy().data, zlib.crc32(name.encode(), total)
        )
    return total
