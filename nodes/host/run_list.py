"""Lists the runs below output/personalize/runs, and the cache next to them, as nodes and the gallery show them.

A run is named by its digest alone, or by a label that ends with it: no path comes from outside.
"""

import contextlib
import re
import shutil

from ...trainers import files
from ...trainers.runs.folder import RunFolder
from ...trainers.runs.info import RunInfo
from ...trainers.text import quoted
from . import live
from .folders import cache_folder, runs_folder

NONE = "there is no run yet"
LONGEST = 60  # characters of a run's name


def folders() -> list[RunFolder]:
    """Return all runs, the newest first."""
    found = [file for file in runs_folder().glob("*/run.json") if is_digest(file.parent.name)]
    return [RunFolder(file.parent) for file in sorted(found, key=lambda file: file.stat().st_mtime, reverse=True)]


def is_digest(text: object) -> bool:
    """Return whether this is a run's digest, 16 hexadecimal digits."""
    return isinstance(text, str) and re.fullmatch(r"[0-9a-f]{16}", text) is not None


def labels() -> list[str]:
    """Return one line per run, the newest first; each ends with the run's digest."""
    return [label(folder, folder.info()) for folder in folders()] or [NONE]


def label(folder: RunFolder, info: RunInfo | None) -> str:
    """Return one line that names a run, whose run.json says `info`, and ends with its digest."""
    if info is None:
        return f"? damaged {folder.path.name}"
    name = f"{info.name}: " if info.name else ""
    state = "" if info.complete else f", {_state(info)}"
    return f"{name}{info.placeholder_token} {info.settings['method']}, {info.steps} steps{state} {folder.path.name}"


def _state(info: RunInfo) -> str:
    return "complete" if info.complete else "interrupted" if info.stop_reason else "not finished"


def find(label: object) -> RunFolder:
    """Return the run that a label, or a digest alone, names.

    Raises:
        ValueError: the run does not exist.
    """
    digest = str(label).rsplit(" ", 1)[-1]  # the host does not see to it that a choice is text
    for folder in folders():
        if folder.path.name == digest:
            return folder
    raise ValueError(f"There is no run {quoted(str(label))}: choose one from the list (press R to refresh it).")


def cards() -> list[dict]:
    """Return what the gallery shows of each run, the newest first."""
    return [_card(folder) for folder in folders()]


def _card(folder: RunFolder) -> dict:
    info, path = folder.info(), folder.path
    card = {"run": path.name, "label": label(folder, info), "size": folder.size()}
    card["seconds"] = (path / "run.json").stat().st_mtime  # since 1970
    if info is None:
        return card
    concept, images = info.settings["concept"], [f"previews/{name}" for name in live.previews(path)[-1:]]
    images += ["images/00.png"] if folder.has("images/00.png") else []
    return card | {
        "name": info.name, "placeholder_token": info.placeholder_token, "class_word": concept.get("class_word", ""),
        "method": info.settings["method"], "steps": info.steps, "state": _state(info), "checkpoint": info.checkpoint,
        "image": images[0] if images else "",
    }  # fmt: skip


def rename(digest: str, name: str) -> None:
    """Name a run; "" takes its name away.

    Raises:
        ValueError: the run does not exist, or the name is no line of text.
        RuntimeError: it is training, or a link leads out of it.
        OSError: it cannot be written.
    """
    name = name.strip()
    if len(name) > LONGEST or not name.isprintable():
        raise ValueError(f"{quoted(name)} cannot name a run: write one line of at most {LONGEST} characters.")
    find(digest).note(name=name)


def note_checkpoint(digest: str, name: str) -> None:
    """Write the file name of its checkpoint into a run, for lists of runs; where that fails the run is as good."""
    folder = RunFolder(runs_folder() / digest)
    info = folder.info()
    if name and info and info.checkpoint != name:
        with contextlib.suppress(OSError, RuntimeError):
            folder.note(checkpoint=name)


def reopen(digest: str, node_id: str) -> None:
    """Let a run that its user ended train on when a Train node is queued again.

    Raises:
        ValueError: the run does not exist.
        RuntimeError: it is training, or cannot go on.
        OSError: it cannot be written.
    """
    find(digest).reopen()
    live.REOPENED[node_id] += 1


def cache_size() -> int:
    """Return the bytes of what runs share."""
    return files.size(cache_folder())


def delete_cache() -> None:
    """Delete what runs share; the next ones compute it again.

    Raises:
        RuntimeError: a run is training, or a link leads out of the folder.
        OSError: a file cannot be deleted.
    """
    folder = cache_folder()
    if live.RUNNING:
        raise RuntimeError("A training is running, which may read the cache: wait until it ends.")
    if link := files.link_in(folder):
        raise RuntimeError(f"The link {quoted(link.name)} in the cache leads to files that are not its own: remove it.")
    with contextlib.suppress(FileNotFoundError):
        shutil.rmtree(folder)
