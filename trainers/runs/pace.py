"""Pace of checkpoints: as often as asked, unless they are so large that training would wait for them."""

import contextlib
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

SMALL = 256 * 2**20  # bytes; a checkpoint up to this size is always written
SHARE = 0.1  # of the time, at most, that is spent on writing larger ones


@dataclass(kw_only=True)
class Pace:
    """Decides when the next checkpoint of a stage is due.

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
