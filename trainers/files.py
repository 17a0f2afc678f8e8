"""Files that are never half written. Nothing else about files."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path


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
