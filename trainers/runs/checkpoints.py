"""Checkpoints on their way to the disk while training goes on, which waits for the copy from the device alone."""

from concurrent.futures import Future, ThreadPoolExecutor, wait

from ..training.state import StageState
from .folder import RunFolder
from .pace import Pace


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
