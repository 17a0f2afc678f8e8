"""Concepts from folders of images, and those that a file lists to be learned together."""

import json
from collections.abc import Mapping
from pathlib import Path

from ..data.concept import Concept
from ..data.joint import joined
from ..images import read_folder
from ..settings import checked
from ..text import quoted, text_of
from .options import Say

FOLDERS = ("images", "class_images")
OF_EACH = ("class_word", "placeholder_token", "initializer_token")  # a subject's own words; the others hold for all


def read(folder: Path, class_folder: Path | None, words: Mapping, say: Say) -> Concept:
    """Return the concept of a folder of images, with class images if there is a folder of them.

    Args:
        say: told of files that are left out.

    Raises:
        ValueError: an image or a word cannot be used.
    """
    images, captions, masks = read_folder(folder, say)
    class_images, class_captions, _ = read_folder(class_folder, say) if class_folder else ((), (), None)
    return Concept(
        images=images,
        masks=masks,
        captions=captions,
        class_images=class_images,
        class_captions=class_captions,
        **words,
    )


def joined_with(file: Path, first: Concept, say: Say) -> Concept:
    """Return a concept joined with those that a file lists, which have its resolution and crop.

    The file is JSON, a list with an object for each concept: its folders "images" and, if it has class images,
    "class_images", and its own words.

    Raises:
        ValueError: the file cannot be read, or a concept in it cannot be used.
    """
    text = text_of(file, f"The list of concepts {quoted(file.name)}", "check its path")
    try:
        entries = json.loads(text)
    except ValueError:
        entries = None
    if not (isinstance(entries, list) and entries and all(isinstance(entry, dict) for entry in entries)):
        raise ValueError(
            f'The list of concepts {quoted(file.name)} is no list: write [{{"images": "DIR", "class_word": "cat", '
            '"placeholder_token": "<cat>"}].'
        )
    common = {"resolution": first.resolution, "crop": first.crop}
    return joined([first, *(_of(entry, common, file.name, say) for entry in entries)])


def _of(entry: Mapping, common: Mapping, name: str, say: Say) -> Concept:
    """Return the concept of an entry of the file `name`."""
    if wrong := [key for key in entry if key not in (*FOLDERS, *OF_EACH)]:
        raise ValueError(f"A concept in {quoted(name)} has {quoted(wrong[0])}: use {', '.join((*FOLDERS, *OF_EACH))}.")
    if "images" not in entry:
        raise ValueError(f"A concept in {quoted(name)} has no images: write the path of their folder.")
    folders = {key: entry[key] for key in FOLDERS if key in entry}
    for folder in folders.values():
        if not (isinstance(folder, str) and folder and Path(folder).is_dir()):
            raise ValueError(f"The folder {quoted(folder)} of {quoted(name)} does not exist: correct its path.")
    words = checked(Concept, {key: entry[key] for key in OF_EACH if key in entry}, "a concept")
    classes = Path(folders["class_images"]) if "class_images" in folders else None
    return read(Path(folders["images"]), classes, {**common, **words}, say)
