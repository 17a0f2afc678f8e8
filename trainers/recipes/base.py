"""The contract that every recipe fulfils."""

from collections.abc import Collection, Iterator
from dataclasses import Field
from typing import ClassVar, Protocol

from torch import Generator

from ..data.concept import Concept
from ..data.context import Context
from ..models.diffusion import Models
from ..training.stage import Stage


class Recipe(Protocol):
    """A personalization method as a frozen dataclass of hyperparameters, each field made by `settings.setting`.

    A recipe that needs a feature extractor, such as a CLIP, also has `extractor_configs`, a tuple of their settings.
    """

    __dataclass_fields__: ClassVar[dict[str, Field]]
    needs: str  # of a model besides layers for a LoRA, as "a text encoder that trains"; empty for nothing

    @property
    def steps(self) -> int:
        """Optimizer steps of all stages that run."""

    def subject(self, concept: Concept) -> str:
        """Return what `{}` stands for in a training prompt, such as `<dog>` or `<dog> dog`."""

    def check(self, concept: Concept, known: Collection[str] = ()) -> None:
        """Raise `ValueError` where these settings cannot learn this concept; quick, before anything is loaded.

        Args:
            known: placeholder tokens that were learned earlier in the graph.
        """

    def stages(self, models: Models, concept: Concept, generator: Generator, context: Context) -> Iterator[Stage]:
        """Yield the stages one after the other; each is trained before the next is asked for.

        Args:
            models: may be changed here (new tokens, LoRA layers); frozen but for what a stage declares as `params`.
            generator: the run's own; the only source of random numbers.
            context: cache, notices and feature extractors.
        """
