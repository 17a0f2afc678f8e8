"""Prompts whose text encoding must not change, with the frozen encoder's outputs (TextBoost)."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Generator, Tensor

from ..models.diffusion import Models
from ..text import captions_of


class PreservationPrompts:
    """Prompts whose text encoding must not change, with the frozen encoder's outputs, each computed once.

    A draw gives the empty prompt in 10 % of the cases, a template with the class word in 10 %, else a caption.
    """

    def __init__(self, models: Models, class_word: str, templates: Sequence[str], captions: Sequence[str]):
        self.templates, self.captions = len(templates), len(captions)
        prompts = ["", *(template.format(class_word) for template in templates), *captions]
        self.ids = models.tokenize(prompts)
        with torch.no_grad():
            self.targets = torch.cat(
                [models.encode_ids(ids.to(models.device)).hidden_states.cpu() for ids in self.ids.split(32)]
            )

    def sample(self, n: int, generator: Generator) -> tuple[Tensor, Tensor]:
        """`n` prompts: ids `[n, E, 77]` and frozen outputs `[n, 77, d]`."""
        kind = torch.rand(n, generator=generator)
        template = torch.randint(1, 1 + self.templates, (n,), generator=generator)
        caption = torch.randint(1 + self.templates, len(self.ids), (n,), generator=generator)
        index = torch.where(kind < 0.1, 0, torch.where(kind < 0.2, template, caption))
        return self.ids[index], self.targets[index]


def shipped_captions() -> tuple[str, ...]:
    """The captions for knowledge preservation that come with this package."""
    return captions_of((Path(__file__).parent / "preservation_captions.txt").read_text(encoding="utf-8"))
