"""Prompts from lines of text, with the subject in its place, and what a text encoder reads of them."""

import difflib
import re
from collections.abc import Sequence

from ..models.tokenizer import ROOM, Tokenizer
from ..text import any_of, captions_of, quoted, unknown_tokens

SUBJECT = "{}"
ALIKE = 0.7  # similarity of two words, by `difflib`, from which one may be a typing error of the other


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


def placeholder_advice(prompts: Sequence[str | None], subjects: dict[str, str]) -> list[str]:
    """Return a sentence about prompts that will not show a subject, or not as it is learned; none where all is well.

    Args:
        prompts: those that a training's text encoder will read; `None` for one that is not known yet.
        subjects: placeholder tokens that are learned, and what stood for their subjects meanwhile: `<dog>` itself, or
            `<dog> dog`.
    """
    known = [prompt for prompt in prompts if prompt and prompt.strip()]
    for prompt in known if subjects else ():
        for word, token in unknown_tokens(prompt, subjects).items():
            if _alike(token, [word]):
                return [f"The prompt {quoted(prompt)} has {word}, which is no placeholder: write {token}."]
    if subjects and known and None not in prompts and not any(re.search(any_of(subjects), text) for text in known):
        token, words = next(iter(subjects)), [word for text in known for word in re.findall(r"[\w<>*-]+", text)]
        near = _alike(token, words)
        where = f"in place of {quoted(near)}" if near else f"where it should be, as in 'a photo of {token}'"
        return [f"No prompt has the placeholder {token}, so no image will show your subject: write it {where}."]
    for token, subject in subjects.items():
        following = r"\s+".join(map(re.escape, subject.removeprefix(token).split()))
        alone = rf"(?:{any_of([token])})(?!\s+(?i:{following})(?!\w))"
        for prompt in known if following else ():
            if re.search(alone, prompt):
                return [
                    f"The prompt {quoted(prompt)} has {token} alone, but this training learns {quoted(subject)}: "
                    "write that in prompts, or connect the output subject of Train."
                ]
    return []


def _alike(token: str, words: Sequence[str]) -> str:
    """Return the word that is nearest to a placeholder token, "" where none looks like it."""
    spellings = {word.lower(): word for word in words}
    return next((spellings[near] for near in difflib.get_close_matches(token.lower(), spellings, 1, ALIKE)), "")
