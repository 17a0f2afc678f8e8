"""Files that are never half written, links that are not followed, and tensors that do not keep their file open."""

import contextlib
import ctypes
import errno
import glob
import os
import secrets
import stat
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from PIL import Image
from safetensors import safe_open
from torch import Tensor


def _longest() -> int:
    """Return the most characters of a path: Windows allows long ones only where its owner has said so."""
    if sys.platform != "win32":
        return os.pathconf("/", "PC_PATH_MAX") - 1
    allowed = getattr(ctypes.WinDLL("ntdll"), "RtlAreLongPathsEnabled", bool)() & 0xFF  # since Windows 10
    return 32_000 if allowed else 259


LONGEST = _longest()
TEMPORARY = ".0123456789abcdef.tmp"  # as long as what `replaced` puts behind a file's stem
ABANDONED = 24 * 60 * 60  # seconds after which nobody writes a temporary file any more


def check_length(path: Path | str, name: str) -> None:
    """Raise `ValueError` where the path of a file to be written is too long for this system.

    Args:
        name: what messages call it, without its folders.
    """
    if (length := _length(path)) > LONGEST:
        raise ValueError(
            f"The path of {name} would be {length} characters long and this system allows {LONGEST}: use a shorter "
            "name, or move ComfyUI to a folder with a shorter path."
        )


def _length(path: Path | str) -> int:
    return len(os.path.splitext(os.path.abspath(path))[0] + TEMPORARY)


@contextlib.contextmanager
def replaced(path: Path | str) -> Iterator[Path]:
    """Yield the path of a new file next to `path` that replaces it when the block ends.

    A process that is killed, or an error such as a full disk, leaves an earlier file of that name as it was. The file
    keeps an earlier one's mode, or gets that of any new file: safetensors gives its own to the owner alone.
    """
    path = Path(path)
    if _length(path) > LONGEST:  # Windows would say that there is no such folder
        raise OSError(errno.ENAMETOOLONG, os.strerror(errno.ENAMETOOLONG))
    _remove_abandoned(path)
    temporary = path.with_name(f"{path.stem}.{secrets.token_hex(8)}.tmp")  # no other process has the name
    try:
        os.close(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))
        mode = _mode(path) or _mode(temporary)
        yield temporary
        os.chmod(temporary, mode)
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.remove(temporary)
        raise


def _mode(path: Path) -> int:
    """Return a file's permission bits; 0 for a link, and where there is no file."""
    try:
        mode = path.lstat().st_mode
    except OSError:
        return 0
    return stat.S_IMODE(mode) if stat.S_ISREG(mode) else 0


def _remove_abandoned(path: Path) -> None:
    """Remove what killed processes left of `path`."""
    for temporary in path.parent.glob(f"{glob.escape(path.stem)}.????????????????.tmp"):
        with contextlib.suppress(OSError):
            if time.time() - temporary.lstat().st_mtime > ABANDONED:
                temporary.unlink()


def inside(folder: Path | str, path: Path | str) -> bool:
    """Return whether a path lies in a folder, after every link in either is followed."""
    root = os.path.realpath(folder)
    try:
        return os.path.commonpath([root, os.path.realpath(path)]) == root
    except ValueError:  # another drive, or a name that no file can have
        return False


def size(folder: Path) -> int:
    """Return the bytes of all files below a folder; links do not count."""
    return sum(file.lstat().st_size for file in folder.rglob("*") if file.is_file() and not file.is_symlink())


def link_in(folder: Path) -> Path | None:
    """Return a link that `folder` is or contains; `None` if there is none."""
    return next((path for path in (folder, *folder.rglob("*")) if path.is_symlink() or _is_junction(path)), None)


def _is_junction(path: Path) -> bool:
    """Return whether this is Windows' link of a folder, which Python knows since 3.12."""
    return hasattr(os.path, "isjunction") and os.path.isjunction(path)


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
