"""Finds files in the host's input, output and model folders, and refuses names that lead out of them."""

import hashlib
import os
import stat
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import folder_paths

from ...trainers.files import inside
from ...trainers.text import quoted, text_of

folder_paths.add_model_folder_path("personalize", os.path.join(folder_paths.models_dir, "personalize"))


SMALL = 2**16  # bytes of a file that is read to see whether it changed
# Widgets that name a file or a folder which the node reads, and the folders in which they are looked for.
FOLDERS: dict[str, Callable[[], list[str]]] = {
    **dict.fromkeys(
        ("folder", "class_folder", "prompt_file", "captions"), lambda: [folder_paths.get_input_directory()]
    ),
    **dict.fromkeys(("clip_weights", "dino_weights", "lpips_weights"), lambda: weight_folders()),
}


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


def diffusers_folders() -> dict[str, Path]:
    """Return, by name, the folders in the host's folder of diffusers' models that hold a U-Net as safetensors."""
    found = [folder for root in folder_paths.get_folder_paths("diffusers") for folder in sorted(Path(root).glob("*"))]
    return {folder.name: folder for folder in reversed(found) if any((folder / "unet").glob("*.safetensors"))}


def weight_folders() -> list[str]:
    """Return the folders in which metric models are looked for."""
    return [folder for kind in ("clip_vision", "personalize") for folder in folder_paths.get_folder_paths(kind)]


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


def fingerprint(values: dict) -> str:
    """Return a digest that changes when a file or folder does that a node's widgets name: `fingerprint_inputs`.

    Args:
        values: widgets by name, also nested ones and lists, with `None` for links; what names no path is passed over.
    """
    return digest_of_files(*_paths(values))


def digest_of_files(*paths: str | Path) -> str:
    """Return a digest of files, and of the files in folders: of their contents, or of the times of large ones."""
    sha = hashlib.sha256()
    for path in map(Path, paths):
        sha.update(path.name.encode(errors="replace"))
        try:
            for file in sorted(path.iterdir()) if path.is_dir() else [path]:
                sha.update(b"\0" + file.name.encode(errors="replace") + b"\0" + _state(file))
        except (OSError, ValueError) as error:  # what is missing may come; a name may be one that no file can have
            sha.update(type(error).__name__.encode())
    return sha.hexdigest()


def _state(file: Path) -> bytes:
    """Return a small file's contents; else what changes with them: its size and times."""
    state = file.stat()
    if stat.S_ISREG(state.st_mode) and state.st_size <= SMALL:
        return file.read_bytes()
    return f"{state.st_size} {state.st_mtime_ns} {state.st_ctime_ns}".encode()


def _paths(values: dict) -> Iterator[Path]:
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _paths(value)
        for text in value if isinstance(value, list) else [value]:
            for folder in FOLDERS[name]() if name in FOLDERS else ():
                if text is None:  # a link: known only when the node before has run
                    yield Path(folder, str(time.time_ns()))
                elif isinstance(text, str) and _is_below(Path(text.strip())):
                    yield Path(folder, text.strip())


def _is_below(path: Path) -> bool:
    return bool(path.parts) and not path.anchor and ".." not in path.parts


def _inside(kind: str, folder: str, name: str) -> str:
    path = os.path.join(folder, name)
    if "\0" in name or not inside(folder, path):
        raise ValueError(
            f"The path {quoted(name)} is not inside ComfyUI's {kind} folder: write its name as it is below {kind}/."
        )
    return os.path.realpath(path)
