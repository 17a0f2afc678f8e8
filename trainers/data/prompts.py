"""Prompts from lines of text, with the subject in its place."""

from ..text import captions_of

SUBJECT = "{}"


def prompts_of(text: str, subject: str, first: int = 0) -> list[str]:
    """Return the lines of `text` with `subject` for each `{}`; empty lines do not count.

    Args:
        first: how many to take, 0 for all.

    Raises:
        ValueError: there is no line, or a line has `{}` for an empty subject.
    """
    lines = captions_of(text)[: first or None]
    if not lines:
        raise ValueError("There is no prompt: write one per line, or name a text file in the input folder.")
    if not subject.strip() and any(SUBJECT in line for line in lines):
        raise ValueError("The subject is empty but prompts have {} for it: write the word that {} stands for.")
    return [line.replace(SUBJECT, subject.strip()) for line in lines]
