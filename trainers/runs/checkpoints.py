"""Checkpoints on their way to the disk: how often, and in a thread, so that training waits for the copies alone."""

import contextlib
import math
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field

from ..training.state import StageState
from .folder import RunFolder

SMALL = 256 * 2**20  # bytes; a checkpoint up to this size is always written
SHARE = 0.1  # of the time, at most, that is spent on writing larger ones


@dataclass(kw_only=True)
class Pace:
    """Decides when the next checkpoint of a stage is due: when it was asked for, but large ones not too often.

    Attributes:
        size: bytes of a checkpoint.
        speed: bytes per second, from the copies on the CPU to the file; a guess until one was written.
    """

    size: int
    speed: float = 0.5e9
    clock: Callable[[], float] = time.monotonic
    idle_since: float = field(init=False)

    def __post_init__(self):
        self.idle_since = self.clock()

    def due(self) -> bool:
        """Return whether writing now takes no more than its share of the time since the last checkpoint."""
        return self.size <= SMALL or SHARE * (self.clock() - self.idle_since) >= self.size / self.speed

    def begin(self) -> None:
        """Have no other large checkpoint become due until `writing` is over."""
        self.idle_since = math.inf

    @contextlib.contextmanager
    def writing(self) -> Iterator[None]:
        """Measure the time in which a checkpoint is written."""
        began = self.clock()
        try:
            yield
            self.speed = self.size / max(self.clock() - began, 1e-6)
        finally:
            self.idle_since = self.clock()

    def words(self) -> str:
        """Say the pace of large checkpoints; "" for small ones."""
        if self.size <= SMALL:
            return ""
        minutes = self.size / self.speed / SHARE / 60
        return (
            f"checkpoints of {self.size / 2**30:.1f} GB are written in at most {SHARE:.0%} of the time, the first one "
            f"after about {minutes:.0f} minutes"
        )


class CheckpointWriter:
    """Writes a run's checkpoints one after the other, in a thread of its own."""

    def __init__(self, folder: RunFolder):
        self._folder = folder
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoints")
        self._last: Future[None] | None = None

    def write(self, stages: tuple[StageState, ...], pace: Pace) -> None:
        """Write the states of the stages so far; they may not change any more.

        Raises:
            OSError, SafetensorError: the one before could not be written.
        """
        if self._last:
            self._last.result()
        pace.begin()
        self._last = self._thread.submit(self._save, stages, pace)

    def settle(self) -> None:
        """Wait until what was given is on the disk, or could not be written: the newest one there counts."""
        if self._last:
            wait([self._last])
            self._last = None

    def close(self) -> None:
        """Wait, and end the thread."""
        self._thread.shutdown()

    def _save(self, stages: tuple[StageState, ...], pace: Pace) -> None:
        with pace.writing():
            self._folder.save_state(stages)
