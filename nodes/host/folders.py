"""Finds files in the host's input, output and model folders, and refuses names that lead out of them."""

import hashlib
import os
from pathlib import Path

import folder_paths

from ...trainers.files import inside
from ...trainers.text import quoted, text_of

folder_paths.add_model_folder_path("personalize", os.path.join(folder_paths.models_dir, "personalize"))


def model_files(kind: str) -> list[str]:
    """Return the names of the files in the host's folders of a kind, such as "loras"."""
    return folder_paths.get_filename_list(kind)


def model_file(kind: str, name: str) -> Path | None:
    """Return the file of that name in the host's folders of a kind; `None` if it does not exist."""
    path = folder_paths.get_full_path(kind, name)
    return path and Path(path)


def model_folder(kind: str) -> str:
    """Return the folder of a kind for new files."""
    return folder_paths.get_folder_paths(kind)[0]


def runs_folder() -> Path:
    """Return the folder of all runs, output/personalize/runs."""
    return Path(folder_paths.get_output_directory()) / "personalize" / "runs"


def cache_folder() -> Path:
    """Return the folder that all runs share for results that are expensive to compute again."""
    return Path(folder_paths.get_output_directory()) / "personalize" / "cache"


def inside_input(name: str) -> str:
    """Return the path of a file or folder below ComfyUI's input folder.

    Raises:
        ValueError: it is outside, however it is written.
    """
    return _inside("input", folder_paths.get_input_directory(), name)


def inside_output(name: str) -> str:
    """Return the path of a file or folder below ComfyUI's output folder.

    Raises:
        ValueError: it is outside, however it is written.
    """
    return _inside("output", folder_paths.get_output_directory(), name)


def text_in_input(name: str, what: str, line: str) -> str:
    """Return the text of a file below ComfyUI's input folder; "" for an empty name.

    Args:
        what: what the file contains, for messages, such as "prompts".
        line: what one line of it is, such as "prompt".

    Raises:
        ValueError: the file is outside that folder, cannot be read, or is empty.
    """
    if not (name := name.strip()):
        return ""
    remedy = "write the name of a text file below input/"
    text = text_of(Path(inside_input(name)), f"The {what} file {quoted(name)}", remedy)
    if not text.strip():
        raise ValueError(f"The {what} file {quoted(name)} is empty: write one {line} per line.")
    return text


def digest_of_text(name: str) -> str:
    """Return a digest of the text of such a file, or the error where it cannot be read."""
    try:
        return hashlib.sha256(text_in_input(name, "text", "line").encode()).hexdigest()
    except ValueError as error:
        return str(error)


def _inside(kind: str, folder: str, name: str) -> str:
    path = os.path.join(folder, name)
    if "\0" in name or not inside(folder, path):
        raise ValueError(
            f"The path {quoted(name)} is not inside ComfyUI's {kind} folder: write its name as it is below {kind}/."
        )
    return os.path.realpath(path)
