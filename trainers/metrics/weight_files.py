"""Where a judge's weights lie: below the allowed folders, in the cache of the hub or, if a user says so, on the hub."""

import re
from collections.abc import Iterable
from pathlib import Path

from ..text import quoted

WHERE = "models/clip_vision or models/personalize"


def below(name: str, folders: Iterable[str | Path], extractor: str) -> Path:
    """The file or folder of that name in the first of the folders that has it.

    Raises:
        ValueError: there is none, it leads elsewhere, or the file is of another kind; `judge` is what it should hold.
    """
    parts = re.split(r"[\\/]", name)
    if "\0" in name or ".." in parts or not parts[0] or ":" in parts[0]:
        raise ValueError(f"{quoted(name)} is no name of {extractor} weights: write it as the file lies below {WHERE}.")
    path = next((path for folder in folders if (path := Path(folder, *parts)).exists()), None)
    if path is None:
        raise ValueError(
            f"There are no {extractor} weights {quoted(name)} below {WHERE}: put them there, or correct the name."
        )
    if path.is_file() and path.suffix != ".safetensors":
        raise ValueError(
            f"The {extractor} weights {quoted(name)} are not a .safetensors file, and other formats can hold programs "
            "that run when they are read: convert them, or choose another file."
        )
    return path


def from_hub(extractor: str, name: str, repository: str, files: Iterable[str], download: bool) -> list[Path]:
    """Files of a repository, as they lie in one folder of this computer.

    Args:
        judge: "CLIP" or "DINO"; its widgets are named so.

    Raises:
        ValueError: they are not here and must not be fetched, or cannot be.
    """
    kind = extractor.lower()
    found = [
        _downloaded(extractor, name, repository, file) if download else _cached(repository, file) for file in files
    ]
    if None in found:
        raise ValueError(
            f"The weights of {extractor} {name} are not on this computer, and {kind}_download is off: turn it on, or "
            f"name a file below {WHERE} as {kind}_weights."
        )
    return found


def _cached(repository: str, file: str) -> Path | None:
    """Without `hf_hub_download`, which may ask the network even when told to look at local files only."""
    from huggingface_hub import try_to_load_from_cache

    path = try_to_load_from_cache(repository, file)
    return Path(path) if isinstance(path, str) else None


def _downloaded(extractor: str, name: str, repository: str, file: str) -> Path:
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(repository, file))
    except Exception as error:  # the hub's own, and those of whatever network lies between
        raise ValueError(
            f"The weights of {extractor} {name} could not be downloaded: check the connection, or name a file below "
            f"{WHERE} as {extractor.lower()}_weights."
        ) from error
