"""Search for a feature extractor's weights: below allowed folders, in the hub's cache or, if allowed, on the hub."""

import hashlib
import re
from collections.abc import Iterable
from pathlib import Path

from ..text import quoted

WHERE = "models/clip_vision or models/personalize"
STRETCHES, LENGTH = 16, 4096  # bytes of a file that are read for its digest


def below(name: str, folders: Iterable[str | Path], extractor: str) -> Path:
    """Find the file or folder of that name in the first of the folders that has it.

    Raises:
        ValueError: there is none, it leads out of the folders, or it is not a .safetensors file.
    """
    parts = re.split(r"[\\/]", name)
    if "\0" in name or ".." in parts or not parts[0] or ":" in parts[0]:
        raise ValueError(f"{quoted(name)} is not a name of {extractor} weights: write the path below {WHERE}.")
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


def digest(files: Iterable[Path]) -> str:
    """Return 16 hexadecimal digits of the files' sizes and of a few stretches of each: quick for gigabytes."""
    sha = hashlib.sha256()
    for path in files:
        size = path.stat().st_size
        sha.update(str(size).encode())
        with path.open("rb") as file:
            for i in range(STRETCHES):
                file.seek(max(0, size - LENGTH) * i // (STRETCHES - 1))
                sha.update(file.read(LENGTH))
    return sha.hexdigest()[:16]


def from_hub(extractor: str, name: str, repository: str, files: Iterable[str], download: bool) -> list[Path]:
    """Return files of a repository in one folder of this computer, downloaded if allowed.

    Args:
        extractor: "CLIP" or "DINO"; its widgets are named so.

    Raises:
        ValueError: they are not here and must not be downloaded, or cannot be.
    """
    kind = extractor.lower()
    found = [
        # What is here already asks nobody: a metric model is looked up at every use.
        _cached(repository, file) or (_downloaded(extractor, name, repository, file) if download else None)
        for file in files
    ]
    if None in found:
        raise ValueError(
            f"The weights of {extractor} {name} are not on this computer, and {kind}_download is off: turn it on (in a "
            f"graph: on Metric Models), or name a file below {WHERE} as {kind}_weights."
        )
    return [file for file in found if file]


def _cached(repository: str, file: str) -> Path | None:
    """Find cached files without `hf_hub_download`, which may ask the network even with `local_files_only`."""
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
