"""A run's folder: what is written while it trains, how a broken-off run goes on, and what a finished one left.

    run.json  images/  previews/  steps.jsonl  checkpoints/  lora.safetensors  clip.safetensors  last.safetensors
    states/step_000050/lora.safetensors, clip.safetensors    states to pick from, where a monitor scores them

Every file but the log is written beside and renamed. A process that is killed at any moment leaves a folder that can
be resumed or, if nothing was learned yet, begun again. Its images are saved_images.py's, run.json is info.py's.
"""

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TextIO

from filelock import FileLock, Timeout
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import save_file

from .. import files
from ..data.concept import Concept
from ..text import quoted
from ..training import state
from ..training.state import StageState
from . import saved_images
from .info import RunInfo
from .result import RunResult

LONGEST_NAME = "class_images/0000000000.safetensors"  # none of a run's files has a longer one
CHECKPOINTS_KEPT = 2  # the newest, and the one before it in case the newest is damaged
LAST_AT_MOST = 256 * 2**20  # bytes; a larger model's last state is not kept, so more steps then start over


class RunFolder:
    """The files of one run; the folder's name is the run's digest."""

    def __init__(self, path: Path):
        self.path = Path(path)

    def check_path(self) -> None:
        """Raise `ValueError` where this system cannot write the run's files because their paths are too long."""
        files.check_length(self.path / LONGEST_NAME, f"the run {self.path.name}")

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Only one process trains here; a process that is killed loses its lock.

        Raises:
            RuntimeError: another process trains here now, or a link leads to files that are not the run's.
            ValueError: the paths of its files are too long.
        """
        self.check_path()
        if link := files.link_in(self.path):
            name = quoted(link.relative_to(self.path.parent).as_posix())
            raise RuntimeError(f"The link {name} leads to files that are not the run's: remove it and queue again.")
        self.path.mkdir(parents=True, exist_ok=True)
        lock = FileLock(self.path / ".lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise RuntimeError(
                f"This training is already running in another ComfyUI (run {self.path.name}): wait until it ends."
            ) from None
        try:
            yield
        finally:
            lock.release()

    # -- before and while training

    def start(self, info: RunInfo, concept: Concept) -> None:
        """run.json, the pictures learned from, and room for previews and checkpoints."""
        for name in ("previews", "checkpoints"):
            (self.path / name).mkdir(parents=True, exist_ok=True)
        saved_images.write(concept, self.path)
        info.write(self.path)

    def save_picture(self, picture: Image.Image, name: str) -> None:
        files.save_png(picture, self.path / name)

    def has(self, name: str) -> bool:
        """Whether there is a file of this name."""
        return (self.path / name).is_file()

    def info(self) -> RunInfo | None:
        """What run.json says; `None` where there is none that can be read, or a link leads to files of others."""
        return None if files.link_in(self.path) else RunInfo.read(self.path)

    def history(self, steps: int) -> list[dict]:
        """The first `steps` entries of the log; what a killed process left behind them does not count.

        Raises:
            OSError, ValueError: it cannot be read, or is shorter.
        """
        lines = (self.path / "steps.jsonl").read_text(encoding="utf-8").splitlines() if steps else []
        if len(lines) < steps:
            raise ValueError(f"The log of run {self.path.name} ends before step {steps}.")
        return [_entry(line) for line in lines[:steps]]

    def log(self, history: list[dict]) -> TextIO:
        """The log with `history` in it, open for more."""
        with files.replaced(self.path / "steps.jsonl") as beside:
            beside.write_text("".join(json.dumps(entry) + "\n" for entry in history), encoding="utf-8")
        return (self.path / "steps.jsonl").open("a", encoding="utf-8")

    def save_state(self, stages: tuple[StageState, ...]) -> None:
        """Write a checkpoint and forget all but the newest ones."""
        folder = self.path / "checkpoints"
        state.save(stages, folder / f"step_{total_steps(stages):06d}.safetensors")
        for old in sorted(folder.glob("step_*.safetensors"))[:-CHECKPOINTS_KEPT]:
            old.unlink()

    def save_result(self, result: RunResult, step: int) -> None:
        """Keep what was learned after a step, to be picked from."""
        self._of_step(step).mkdir(parents=True, exist_ok=True)
        self._save_learned(result, self._of_step(step))

    def _of_step(self, step: int) -> Path:
        return self.path / "states" / f"step_{step:06d}"

    def last_state(self, before: int | None = None) -> tuple[StageState, ...]:
        """The newest checkpoint that is not damaged, whose steps the log has, and not later than step `before`.

        Empty if there is none.
        """
        files = sorted((self.path / "checkpoints").glob("step_*.safetensors"), reverse=True)
        for file in [*files, self.path / "last.safetensors"]:
            stages = state.load(file)
            if stages and (before is None or total_steps(stages) <= before) and self._logged(total_steps(stages)):
                return stages
        return ()

    def _logged(self, steps: int) -> bool:
        try:
            self.history(steps)
        except (OSError, ValueError):
            return False
        return True

    def ancestor(self, lineage: str, steps: int) -> tuple["RunFolder", tuple[StageState, ...]]:
        """The run beside this one that went furthest towards its `steps`, the same but for their number, and its state.

        This one and no state, if there is none.
        """
        best: RunFolder = self
        stages: tuple[StageState, ...] = ()
        for path in self.path.parent.iterdir() if lineage else ():
            other = RunFolder(path)
            if path != self.path and (info := other.info()) and info.lineage == lineage:
                theirs = other.last_state(before=steps - 1)
                best, stages = (other, theirs) if total_steps(theirs) > total_steps(stages) else (best, stages)
        return best, stages

    # -- results

    def finish(self, result: RunResult, stages: tuple[StageState, ...], info: RunInfo) -> None:
        """The learned weights, and run.json last: only a run that says so is complete.

        The checkpoints of a complete run, with the optimizer's moments, are deleted; its last state stays for a run
        with more steps. A broken-off one keeps them beside what it learned.
        """
        self._save_learned(result, self.path)
        if result.complete and sum(p.nbytes for stage in stages for p in stage.params) <= LAST_AT_MOST:
            state.save(stages, self.path / "last.safetensors")
        end: dict = {"complete": result.complete, "stop_reason": result.stop_reason, "seconds": result.seconds}
        replace(info, **end, steps=len(result.history), stops=result.stops).write(self.path)
        if result.complete:
            shutil.rmtree(self.path / "checkpoints", ignore_errors=True)

    def result(self, partial: bool = False, step: int = 0) -> RunResult | None:
        """What the run learned, or `None` if it holds no complete result that can be read.

        Args:
            partial: also what a run learned before it was broken off.
            step: what `save_result` kept after this step; 0 for the end.
        """
        info = self.info()
        if not info or not (info.complete or (partial and info.stop_reason)):
            return None
        try:
            place = self._of_step(step) if step else self.path
            lora, learned = (files.tensors(place / f"{name}.safetensors")[0] for name in ("lora", "clip"))
            result = RunResult.read(info, lora, learned, self.path, self.history(info.steps))
            return replace(result, picked=step) if result.tokens or result.lora else None
        except (OSError, SafetensorError, LookupError, TypeError, ValueError):
            return None

    def reopen(self) -> None:
        """Let a run that its user ended go on when it is queued again, from its last state with new moments.

        Raises:
            RuntimeError: it is training, or cannot go on.
            OSError: it cannot be written.
        """
        with self.lock():
            info = self.info()
            if not info or not info.ended_by_user or not self.has("last.safetensors"):
                raise RuntimeError(f"The run {self.path.name} cannot train on: only one that Finish now ended can.")
            replace(info, complete=False).write(self.path)

    def size(self) -> int:
        """Bytes on disk."""
        return files.size(self.path)

    def note(self, **changes) -> None:
        """Write other values of fields into run.json that decide nothing: its name, or its checkpoint.

        Its time stays that of the training.

        Raises:
            RuntimeError: the run is training, or a link leads out of it.
            OSError: it cannot be written.
        """
        with self.lock():
            if info := RunInfo.read(self.path):
                times = (self.path / "run.json").stat()
                replace(info, **changes).write(self.path)
                os.utime(self.path / "run.json", ns=(times.st_atime_ns, times.st_mtime_ns))

    def delete(self) -> None:
        """Raises RuntimeError while the run is training, and where a link leads out of it."""
        with self.lock():
            for name in os.listdir(self.path):
                path = self.path / name
                if name != ".lock":
                    shutil.rmtree(path) if path.is_dir() else path.unlink()
        shutil.rmtree(self.path)

    def _save_learned(self, result: RunResult, place: Path) -> None:
        header = result.metadata()
        for name, tensors in (("lora", result.lora), ("clip", result.learned())):
            with files.replaced(place / f"{name}.safetensors") as beside:
                save_file(tensors, beside, metadata=header)


class StepLog:
    """steps.jsonl while a run trains: the lines in memory are those on the disk."""

    def __init__(self, folder: RunFolder, entries: list[dict]):
        self.folder = folder
        self._write(entries)

    def __len__(self) -> int:
        return len(self.entries)

    def append(self, entry: dict) -> None:
        self.entries.append(entry)
        self.file.write(json.dumps(entry) + "\n")
        self.file.flush()

    def rewind(self, steps: int) -> None:
        """Forget what came after `steps`."""
        self.close()
        self._write(self.entries[:steps])

    def _write(self, entries: list[dict]) -> None:
        self.entries, self.file = entries, self.folder.log(entries)

    def close(self) -> None:
        self.file.close()


def _entry(line: str) -> dict:
    try:
        entry = json.loads(line)
    except RecursionError:
        entry = None
    if not isinstance(entry, dict):
        raise ValueError("A line of the log is no step.")
    return entry


def total_steps(stages: tuple[StageState, ...]) -> int:
    return sum(stage.step for stage in stages)
