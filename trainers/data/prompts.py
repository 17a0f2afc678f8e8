"""Prompts from lines of text, with the subject in its place, and what a text encoder reads of them."""

from ..models.tokenizer import ROOM, Tokenizer
from ..text import captions_of, quoted

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


def cut_off(tokenizer: Tokenizer, name: str, prompt: str, reserved: int = 0) -> str:
    """Return a sentence if a text encoder does not read the end of a prompt; "" if it reads all of it.

    Args:
        name: what messages call it, such as "caption".
        reserved: tokens of the 75 that may stand before it.

    Raises:
        ValueError: it does not read the placeholder token either.
    """
    ids, room = tokenizer.words(prompt), ROOM - reserved
    if len(ids) <= room:
        return ""
    for token, own in tokenizer.placeholders.items():
        if own[0] in ids and ids.index(own[0]) + len(own) > room:
            raise ValueError(
                f"The {name} {quoted(prompt)} has {token} behind the {room} tokens that are read: shorten what stands "
                "before it."
            )
    return f"The {name} {quoted(prompt)} has {len(ids)} tokens, of which the first {room} are read: shorten it."
