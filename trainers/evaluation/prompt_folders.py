"""Folder names for prompts that every file system accepts. No files are touched here."""

import re

from ..text import quoted

LONGEST_NAME = 48  # of a prompt's folder: Windows allows 260 characters from the drive to the end of an image's name
LONGEST_PREFIX = 100


# Not in Windows' names, and the host's Save Image replaces what stands between two %.
REFUSED = re.compile(r'[<>:"|?*%\x00-\x1f\x7f]')
RESERVED = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?", re.IGNORECASE)


def folder_names(prompts: list[str]) -> list[str]:
    """Return names like `01_a_photo_of_concept`, sorted as the prompts and always distinct."""
    digits = max(2, len(str(len(prompts))))
    return [_folder_name(f"{number:0{digits}}", prompt) for number, prompt in enumerate(prompts, 1)]


def _folder_name(number: str, prompt: str) -> str:
    """Return as many whole words as fit; letters and digits of any language only."""
    name = number
    for word in re.findall(r"[^\W_]+", prompt):
        if len(name) + 1 + len(word) > LONGEST_NAME:
            break
        name += f"_{word}"
    return name


def folder_of(prefix: str) -> str:
    """Return a prefix as a path below the output folder, with `/` between its folders.

    Raises:
        ValueError: it leads elsewhere, or some system takes no such name.
    """
    path = prefix.strip().replace("\\", "/")
    parts = path.removesuffix("/").split("/")
    if len(path) > LONGEST_PREFIX or not all(map(is_name, parts)):
        raise ValueError(
            f"The prefix {quoted(prefix)} cannot be a folder of the output folder: write names with / between them, at "
            f"most {LONGEST_PREFIX} characters, such as personalize/prompts."
        )
    return "/".join(parts)


def is_name(part: str) -> bool:
    """Return whether every system takes a name: not an empty one, `..`, one that ends in a dot, a device of Windows."""
    return (
        bool(part) and part == part.strip(" ").rstrip(".") and not REFUSED.search(part) and not RESERVED.fullmatch(part)
    )


def table(prompts: list[str], folders: list[str]) -> str:
    """Return the contents of prompts.txt: a folder and its prompt per line, with a tab between."""
    return "".join(f"{folder}\t{prompt}\n" for folder, prompt in zip(folders, prompts, strict=True))
