"""A run's folder that several processes share: the first writes, the others read what it wrote."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

import torch
import torch.distributed as dist

from ..data.concept import Concept
from ..training.state import StageState
from .folder import RunFolder
from .info import RunInfo
from .result import RunResult


class SharedFolder(RunFolder):
    """A run's folder that all processes read and the first one alone writes."""

    def __init__(self, path: Path):
        super().__init__(path)
        self.writes = dist.get_rank() == 0

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        with super().lock() if self.writes else contextlib.nullcontext():
            yield

    def last_state(self, before: int | None = None) -> tuple[StageState, ...]:
        with together():
            return super().last_state(before)

    def ancestor(self, lineage: str, steps: int) -> tuple[RunFolder, tuple[StageState, ...]]:
        with together():
            return super().ancestor(lineage, steps)

    def start(self, info: RunInfo, concept: Concept) -> None:
        if self.writes:
            super().start(info, concept)

    def save_picture(self, image, name: str) -> None:
        if self.writes:
            super().save_picture(image, name)

    def log(self, history: list[dict]) -> TextIO:
        return super().log(history) if self.writes else Path(os.devnull).open("a", encoding="utf-8")

    def save_state(self, stages: tuple[StageState, ...]) -> None:
        if self.writes:
            super().save_state(stages)

    def save_result(self, result: RunResult, step: int) -> None:
        if self.writes:
            super().save_result(result, step)

    def finish(self, result: RunResult, stages: tuple[StageState, ...], info: RunInfo) -> None:
        if self.writes:
            super().finish(result, stages, info)


@contextlib.contextmanager
def together() -> Iterator[None]:
    """Let no process enter before all have come, and none leave before all are done."""
    _wait()
    yield
    _wait()


def _wait() -> None:
    dist.all_reduce(torch.zeros(1))
