"""Files that are never half written, and tensors that do not keep their file open."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from PIL import Image
from safetensors import safe_open
from torch import Tensor


@contextlib.contextmanager
def replaced(path: Path | str) -> Iterator[Path]:
    """Where to write what becomes `path` when the block ends.

    A process that is killed, or an error such as a full disk, leaves an earlier file of that name as it was.
    """
    path = Path(path)
    beside = path.with_suffix(".tmp")
    try:
        yield beside
        os.replace(beside, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.remove(beside)
        raise


def save_png(picture: Image.Image, path: Path) -> None:
    with replaced(path) as beside:
        picture.save(beside, format="PNG")


def tensors(path: Path | str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a safetensors file and its header's words.

    Copies: what safetensors hands out is the file itself, and who changes that ends every process that reads it.

    Raises:
        OSError, SafetensorError: it cannot be read.
    """
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name).clone() for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
