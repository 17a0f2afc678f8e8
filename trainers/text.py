"""Parts of messages for users: their own words, shortened, and the system's reason about a file."""

import os
from pathlib import Path


def quoted(words: object, most: int = 80) -> str:
    """Quote what a user wrote, on one line and never so long that it hides the rest of the sentence."""
    text = repr(words)
    return text if len(text) <= most else f"{text[: most // 2]}...{text[-most // 2 :]}"


def reason(error: Exception) -> str:
    """Say why a file cannot be used, without its path: error messages are shown to whoever asks the server."""
    number = getattr(error, "errno", None) or _number_in(str(error))
    return os.strerror(number) if number else "its contents are damaged"


def text_of(file: Path, name: str, remedy: str) -> str:
    """Read a text file.

    Args:
        name: what messages call it, such as "The caption 'a.txt'".
        remedy: what to do where it cannot be read.

    Raises:
        ValueError: it cannot be read, or is not UTF-8.
    """
    try:
        return file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{name} cannot be read as text: save it as UTF-8.") from error
    except OSError as error:
        raise ValueError(f"{name} cannot be read ({reason(error)}): {remedy}.") from error


def _number_in(message: str) -> int | None:
    """Find the system's error number that safetensors puts into its text: '... (os error 27)'."""
    number = message.partition("(os error ")[2].partition(")")[0]
    return int(number) if number.isdigit() else None


def captions_of(text: str) -> tuple[str, ...]:
    """Split text into captions, one per line; empty lines do not count."""
    return tuple(line.strip() for line in text.splitlines() if line.strip())
