"""The DreamBooth data set on disk, or another of its form: its subjects and their classes.

    DIR/<subject>/*.jpg      DIR/prompts_and_classes.txt      or both in DIR/dataset

The text file's first part is a table, `subject_name,class` and a line for each subject; other data sets may add the
columns `kind` (live or object) and `initializer`. Without the file the published subjects are recognized by name.
"""

import csv
import json
from dataclasses import dataclass, replace
from pathlib import Path

from ...images import image_files
from ...text import captions_of, quoted, reason, text_of

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
    initializer: str = ""  # "" for the class word
    reference: str = ""  # file name of the first image to train on; "" for the first by name


def read(folder: Path, only: list[str]) -> list[Subject]:
    """Return the subjects that have a folder with images, by name; only those in a non-empty `only`, in its order.

    Raises:
        ValueError: there is no subject, none of a name, or one has no class.
    """
    root = folder / "dataset" if (folder / "dataset").is_dir() else folder
    names = sorted(each.name for each in root.glob("*") if each.is_dir() and image_files(each))
    if not names:
        raise ValueError(
            f"The folder {quoted(folder.name)} has no subjects: give a copy of the DreamBooth data set, in which "
            "each subject is a folder of images."
        )
    if unknown := [name for name in only if name not in names]:
        raise ValueError(f"The subject {quoted(unknown[0])} does not exist: choose among {', '.join(names)}.")
    table = _table(root / CLASSES)
    return [_subject(root / name, table.get(name, {})) for name in only or names]


def with_references(subjects: list[Subject], file: Path | None) -> list[Subject]:
    """Return the subjects with the image that each is trained on: a file's, or, where it exists, TextBoost's authors'.

    Raises:
        ValueError: the file cannot be read, or names an image that a subject does not have.
    """
    named = _published()["references"] if file is None else _listed(file, "image.jpg")
    found = []
    for subject in subjects:
        name = named.get(subject.name, "")
        there = name in {image.name for image in image_files(subject.folder)}
        if name and not there and file:
            raise ValueError(
                f"The subject {quoted(subject.name)} has no image {quoted(name)}: correct its line in {file.name}."
            )
        found.append(replace(subject, reference=name if there else ""))
    return found


def with_initializers(subjects: list[Subject], file: Path | None) -> list[Subject]:
    """Return the subjects with their initializers: of a file, or of TextBoost's authors where the data set has none.

    Raises:
        ValueError: the file cannot be read.
    """
    if file:
        listed = _listed(file, "words")
        return [replace(subject, initializer=listed.get(subject.name, subject.initializer)) for subject in subjects]
    named = _published()["initializers"]
    return [replace(subject, initializer=subject.initializer or named.get(subject.name, "")) for subject in subjects]


def _listed(file: Path, value: str) -> dict[str, str]:
    """Read a file with a line `subject,value` for each subject."""
    pairs = [
        line.partition(",") for line in captions_of(text_of(file, f"The list {quoted(file.name)}", "check its path"))
    ]
    if wrong := [name for name, comma, second in pairs if not comma or not second.strip()]:
        raise ValueError(f"The line {quoted(wrong[0])} of {quoted(file.name)} has no value: write subject,{value}.")
    return {name.strip(): second.strip() for name, _, second in pairs}


def kind_of(class_word: str) -> str:
    """Return whether a class is live or an object."""
    return LIVE if class_word in _published()["live"] else OBJECT


def _published() -> dict:
    return json.loads(FILE.read_text(encoding="utf-8"))


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
