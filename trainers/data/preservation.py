"""Prompts whose text encoding must not change, with the frozen encoder's outputs (TextBoost)."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Generator, Tensor

from ..models.diffusion import Models
from ..text import captions_of


@dataclass(frozen=True, kw_only=True)
class PromptMix:
    """Probabilities of the kinds of preservation prompts; the rest are captions."""

    empty: float  # the empty prompt
    class_word: float  # a template with the class word


class PreservationPrompts:
    """Prompts whose text encoding must not change, with the frozen encoder's outputs, each computed once.

    Args:
        class_words: of all subjects.
        templates: prompts with `{}` for a class word.
        captions: prompts as they are.
        mix: how often each kind is drawn.
    """

    def __init__(
        self,
        models: Models,
        class_words: Sequence[str],
        templates: Sequence[str],
        captions: Sequence[str],
        mix: PromptMix,
    ):
        of_classes = [template.format(word) for word in class_words for template in templates]
        self.templates, self.captions, self.mix = len(of_classes), len(captions), mix
        prompts = ["", *of_classes, *captions]
        self.ids = models.tokenize(prompts)
        with torch.no_grad():
            self.targets = torch.cat(
                [models.encode_ids(ids.to(models.device)).hidden_states.cpu() for ids in self.ids.split(32)]
            )

    def sample(self, n: int, generator: Generator) -> tuple[Tensor, Tensor]:
        """Draw `n` prompts: ids `[n, E, 77]` for E text encoders, and frozen outputs `[n, 77, d]`."""
        kind = torch.rand(n, generator=generator)
        template = torch.randint(1, 1 + self.templates, (n,), generator=generator)
        caption = torch.randint(1 + self.templates, len(self.ids), (n,), generator=generator)
        empty, other = self.mix.empty, self.mix.empty + self.mix.class_word
        index = torch.where(kind < empty, 0, torch.where(kind < other, template, caption))
        return self.ids[index], self.targets[index]


def shipped_captions() -> tuple[str, ...]:
    """Read the captions for knowledge preservation that come with this package."""
    return captions_of((Path(__file__).parent / "preservation_captions.txt").read_text(encoding="utf-8"))
