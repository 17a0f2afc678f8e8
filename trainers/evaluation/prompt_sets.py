"""Prompts of an evaluation, the subject in them, and the texts that CLIP-T compares with.

Prompts are templates with `{}` for the subject. The published sets are data, with their sources: prompt_sets.json.
"""

import json
import re
from dataclasses import dataclass
from pathlib import Path

from ..data.concept import Concept
from ..data.prompts import SUBJECT
from ..text import captions_of, quoted

OWN = "own"
TOKEN_FORMAT = "V"
CLASS_WORD, REMOVED = "class word", "removed"
FILE = Path(__file__).parent / "prompt_sets.json"


def published() -> dict[str, list[str]]:
    """Read the templates of every published set, by its name."""
    return {name: entry["prompts"] for name, entry in json.loads(FILE.read_text(encoding="utf-8")).items()}


def templates(prompt_set: str, own: str, first: int = 0) -> list[str]:
    """Return the first templates of a set, or lines of `own`; all of them where `first` is 0.

    Raises:
        ValueError: there is no prompt, or no set of that name.
    """
    sets = published()
    if prompt_set != OWN and prompt_set not in sets:
        raise ValueError(f"There is no prompt set {quoted(prompt_set)}: choose one of {', '.join([*sets, OWN])}.")
    lines = [*captions_of(own)] if prompt_set == OWN else sets[prompt_set]
    if not lines:
        raise ValueError("There is no prompt: write one per line, with {} for the subject, or name a text file.")
    return lines[: first or None]


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """A prompt: its template, the text to generate from and the text that CLIP-T compares with."""

    template: str
    prompt: str
    text: str


def prompts(lines: list[str], concept: Concept, token_format: str, compare_with: str) -> list[Prompt]:
    """Fill the subject into templates.

    Args:
        token_format: V is the placeholder, C the class word, as in "V C" and "sks C"; or any text with {} for the
            placeholder.
        compare_with: what stands for the subject in CLIP-T's text: CLASS_WORD, or REMOVED as in the DVAR and Textual
            Inversion papers.

    Raises:
        ValueError: the format is empty.
    """
    subject = subject_of(token_format, concept.placeholder_token, concept.class_word)
    other = concept.class_word if compare_with == CLASS_WORD else ""
    return [
        Prompt(
            template=line,
            prompt=line.replace(SUBJECT, subject),
            text=" ".join(line.replace(SUBJECT, other).split()),
        )
        for line in lines
    ]


def subject_of(token_format: str, placeholder: str, class_word: str) -> str:
    """Return the subject as it stands in a prompt."""
    check_format(token_format)
    if SUBJECT in token_format:
        return token_format.strip().replace(SUBJECT, placeholder)
    words = {"V": placeholder, "C": class_word}
    return re.sub(r"\b[VC]\b", lambda found: words[found[0]], token_format.strip())


def check_format(token_format: str) -> None:
    """Raise `ValueError` if the format is empty."""
    if not token_format.strip():
        raise ValueError(
            "The token format is empty: write V for the placeholder token, V C with the class word, or sks C."
        )
