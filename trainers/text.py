"""Words of users: in messages, shortened; whole ones in prompts; and the system's reason about a file."""

import difflib
import errno
import os
import re
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path

NAMED = 5  # files that are left out, in messages; the others are counted
# By the system's number of an error: what to do where a file cannot be written.
REMEDIES = {
    **dict.fromkeys((errno.EROFS, errno.EACCES, errno.EPERM), "allow ComfyUI to write there"),
    **dict.fromkeys((errno.ENOENT, errno.ENOTDIR), "put the folder back that was moved or deleted"),
    **dict.fromkeys((errno.EMFILE, errno.ENFILE), "raise the system's limit of open files"),
    errno.EBUSY: "close the program that uses it",
    errno.EIO: "check that disk",
    errno.ENAMETOOLONG: "use a shorter name, or move ComfyUI to a folder with a shorter path",
}


def quoted(words: object, most: int = 80) -> str:
    """Quote what a user wrote, on one line and never so long that it hides the rest of the sentence."""
    text = repr(words)
    return text if len(text) <= most else f"{text[: most // 2]}...{text[-most // 2 :]}"


def left_out(names: Sequence[str]) -> str:
    """Return a line with the names of a folder's files that are neither images nor belong to one."""
    more = f" and {len(names) - NAMED} more" if names[NAMED:] else ""
    return f"left out: {', '.join(map(quoted, names[:NAMED]))}{more}"


def reason(error: Exception) -> str:
    """Say why a file cannot be used, without its path: error messages are shown to whoever asks the server."""
    number = getattr(error, "errno", None) or _number_in(str(error))
    return os.strerror(number) if number else "its contents are damaged"


def remedy(error: Exception) -> str:
    """Say what to do where a file cannot be written, by the system's reason."""
    number = getattr(error, "errno", None) or _number_in(str(error))
    return REMEDIES.get(number or 0, "make room on that disk")


def sentence_of(error: Exception) -> str:
    """Return an error's message on one line, a system's without the folders of this machine."""
    if isinstance(error, OSError) and error.errno:
        name = f" {quoted(Path(os.fsdecode(error.filename)).name)}" if isinstance(error.filename, str | bytes) else ""
        return f"The file{name} cannot be used ({reason(error)}): {remedy(error)}."
    return " ".join(str(error).split()) or type(error).__name__


def size_of(size: int) -> str:
    """Return a number of bytes as text, in the unit that shows it."""
    return f"{size / 2**30:.1f} GB" if size >= 2**30 else f"{size / 2**20:.1f} MB"


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


def joined(sentences: Iterable[str]) -> str:
    """Return sentences as one, with semicolons between them."""
    first, *others = (sentence.removesuffix(".") for sentence in sentences)
    return "; ".join([first, *(other[:1].lower() + other[1:] for other in others)]) + "."


def as_lines(texts: Sequence[str]) -> str:
    """Return the text of a widget as it is, and a list's texts as one line each."""
    return texts[0] if len(texts) == 1 else "\n".join(" ".join(text.split()) for text in texts)


def captions_of(text: str) -> tuple[str, ...]:
    """Split text into captions, one per line; empty lines do not count."""
    return tuple(line.strip() for line in text.splitlines() if line.strip())


def any_of(words: Iterable[str]) -> str:
    """Return a regular expression for any of some words as a whole, the longest first: `007` is not in `2007`."""
    return "|".join(map(_whole, sorted(words, key=len, reverse=True)))


def _whole(word: str) -> str:
    before, after = (r"(?<!\w)" if _in_word(word[0]) else ""), (r"(?!\w)" if _in_word(word[-1]) else "")
    return f"{before}{re.escape(word)}{after}"


def _in_word(letter: str) -> bool:
    return bool(re.match(r"\w", letter))


def unknown_tokens(prompt: str, known: Collection[str]) -> dict[str, str]:
    """Return what looks like a placeholder token in a prompt and is none, each with the nearest of those known.

    This is a word in angle brackets, and a known token with other capitals: `<Concept>` is not `<concept>`.
    """
    tokens = any_of(known)
    rest = re.sub(tokens, " ", prompt)
    nearest = {token.lower(): token for token in known}
    found = re.findall(rf"<[\w*-]+>|(?i:{tokens})", rest)
    return {word: nearest[difflib.get_close_matches(word.lower(), nearest, 1, 0.0)[0]] for word in found}
