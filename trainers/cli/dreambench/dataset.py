"""The DreamBooth data set on disk, or another of its form: its subjects and their classes.

    DIR/<subject>/*.jpg      DIR/prompts_and_classes.txt      or both in DIR/dataset

The text file's first part is a table, `subject_name,class` and a line for each subject; other data sets may add the
columns `kind` (live or object) and `initializer`. Without the file the published subjects are recognized by name.
"""

import csv
import json
from dataclasses import dataclass
from pathlib import Path

from ...images import EXTENSIONS
from ...text import quoted, reason

CLASSES = "prompts_and_classes.txt"
FILE = Path(__file__).parent / "subjects.json"
LIVE, OBJECT = "live", "object"


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A subject of a data set."""

    name: str
    folder: Path
    class_word: str
    kind: str  # LIVE or OBJECT
    initializer: str = ""


def read(folder: Path, only: list[str]) -> list[Subject]:
    """Return the subjects that have a folder with images, by name; only those in a non-empty `only`, in its order.

    Raises:
        ValueError: there is no subject, none of a name, or one has no class.
    """
    root = folder / "dataset" if (folder / "dataset").is_dir() else folder
    names = sorted(each.name for each in root.glob("*") if each.is_dir() and _has_images(each))
    if not names:
        raise ValueError(
            f"The folder {quoted(folder.name)} has no subjects: give a copy of the DreamBooth data set, in which "
            "each subject is a folder of images."
        )
    if unknown := [name for name in only if name not in names]:
        raise ValueError(f"The subject {quoted(unknown[0])} does not exist: choose among {', '.join(names)}.")
    table = _table(root / CLASSES)
    return [_subject(root / name, table.get(name, {})) for name in only or names]


def kind_of(class_word: str) -> str:
    """Return whether a class is live or an object."""
    return LIVE if class_word in _published()["live"] else OBJECT


def _published() -> dict:
    return json.loads(FILE.read_text(encoding="utf-8"))


def _has_images(folder: Path) -> bool:
    return any(file.suffix.lower() in EXTENSIONS for file in folder.iterdir())


def _table(file: Path) -> dict[str, dict[str, str]]:
    """Read each subject's columns from the file; without one, return the published classes."""
    if not file.exists():
        return {name: {"class": word} for name, word in _published()["classes"].items()}
    try:
        lines = file.read_text(encoding="utf-8-sig").splitlines()
        lines = [line.strip() for line in lines]
        start = next(i for i, line in enumerate(lines) if line.startswith("subject_name,"))
    except (OSError, ValueError, StopIteration) as error:
        why = reason(error) if isinstance(error, OSError) else "it has no line subject_name,class"
        raise ValueError(f"{CLASSES} cannot be read ({why}): take it from the data set.") from error
    end = lines.index("", start) if "" in lines[start:] else len(lines)
    return {row["subject_name"]: row for row in csv.DictReader(lines[start:end])}


def _subject(folder: Path, row: dict[str, str]) -> Subject:
    found = {name: (row.get(name) or "").strip() for name in ("class", "kind", "initializer")}
    if not found["class"]:
        raise ValueError(f"The subject {quoted(folder.name)} has no class: add its line to {CLASSES}.")
    kind = found["kind"] or kind_of(found["class"])
    if kind not in (LIVE, OBJECT):
        raise ValueError(f"The kind of {quoted(folder.name)} is {quoted(kind)}: use {LIVE} or {OBJECT}.")
    return Subject(
        name=folder.name, folder=folder, class_word=found["class"], kind=kind, initializer=found["initializer"]
    )
