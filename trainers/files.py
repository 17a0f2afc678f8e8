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
    """Yield a path next to `path` that replaces it when the block ends.

    A process that is killed, or an error such as a full disk, leaves an earlier file of that name as it was.
    """
    path = Path(path)
    temporary = path.with_suffix(".tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.remove(temporary)
        raise


def save_png(image: Image.Image, path: Path) -> None:
    """Write an image as PNG, never half."""
    with replaced(path) as temporary:
        image.save(temporary, format="PNG")


def tensors(path: Path | str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors of a safetensors file and its header's metadata.

    The tensors are copies: safetensors hands out the mapped file itself, and a change of it ends every process that
    reads it.

    Raises:
        OSError, SafetensorError: the file cannot be read.
    """
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name).clone() for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
