"""Where the host keeps files: its input, output and model folders, and names that may not leave them."""

import hashlib
import os
from pathlib import Path

import folder_paths

from ...trainers.text import quoted, reason

folder_paths.add_model_folder_path("personalize", os.path.join(folder_paths.models_dir, "personalize"))


def model_files(kind: str) -> list[str]:
    """The names of the files in the host's folders of a kind, such as "loras"."""
    return folder_paths.get_filename_list(kind)


def model_file(kind: str, name: str) -> Path | None:
    """The file of that name in the host's folders of a kind; `None` where there is none."""
    path = folder_paths.get_full_path(kind, name)
    return path and Path(path)


def model_folder(kind: str) -> str:
    """The folder of a kind that new files go into."""
    return folder_paths.get_folder_paths(kind)[0]


def runs_folder() -> Path:
    return Path(folder_paths.get_output_directory()) / "personalize" / "runs"


def cache_folder() -> Path:
    """What is costly to compute again, for any run."""
    return Path(folder_paths.get_output_directory()) / "personalize" / "cache"


def inside_input(name: str) -> str:
    """The path of a file or folder below ComfyUI's input folder.

    Raises:
        ValueError: it lies elsewhere, however it is spelled.
    """
    return _inside("input", folder_paths.get_input_directory(), name)


def inside_output(name: str) -> str:
    """The same of ComfyUI's output folder."""
    return _inside("output", folder_paths.get_output_directory(), name)


def text_in_input(name: str, what: str, line: str) -> str:
    """The text of a file below ComfyUI's input folder; "" for an empty name.

    Args:
        what: the file holds, and `line` one of them, as messages call them.

    Raises:
        ValueError: a file that lies elsewhere, cannot be read, or is empty.
    """
    if not (name := name.strip()):
        return ""
    try:
        text = Path(inside_input(name)).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"The {what} file {quoted(name)} cannot be read as text: save it as UTF-8.") from error
    except OSError as error:
        raise ValueError(
            f"The {what} file {quoted(name)} cannot be read ({reason(error)}): write the name of a text file as it is "
            "below input/."
        ) from error
    if not text.strip():
        raise ValueError(f"The {what} file {quoted(name)} is empty: write one {line} per line.")
    return text


def digest_of_text(name: str) -> str:
    """Another word when the text of such a file is another, or cannot be read."""
    try:
        return hashlib.sha256(text_in_input(name, "text", "line").encode()).hexdigest()
    except ValueError as error:
        return str(error)


def _inside(kind: str, folder: str, name: str) -> str:
    root = os.path.realpath(folder)
    path = os.path.realpath(os.path.join(root, name)) if "\0" not in name else ""
    try:
        inside = os.path.commonpath([root, path]) == root
    except ValueError:  # another drive
        inside = False
    if not inside:
        raise ValueError(
            f"{quoted(name)} is not inside ComfyUI's {kind} folder: write its name as it is below {kind}/."
        )
    return path
