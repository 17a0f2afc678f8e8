"""Batches of augmented views with prompts that describe them, and of class pictures beside them.

The views are encoded ahead, so that no autoencoder runs inside a step.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import cycle, repeat

import torch
from torch import Generator

from ..digest import choose
from ..models.diffusion import Models
from . import augmentation
from .augmentation import Picture
from .batch import Batch
from .class_images import ClassImages
from .concept import Concept, Cuts
from .latents import Latents, View, encode_views
from .preservation import PreservationPrompts


@dataclass(frozen=True, kw_only=True)
class PairedViews:
    """How a picture and its prompt change together.

    Attributes:
        templates: prompts with `{}` for the subject, for pictures without a caption.
        subject: what `{}` stands for.
        augment: a picture and its mask to one view of it, drawn from a generator.
        pool: views that are encoded ahead and shown again and again; 0 encodes fresh ones for every step.
        naming: how a prompt names what was done to its picture: "tokens", "words" or "none".
        tokens: the augmentations' own tokens that prompts may then hold, each with its initializer.
    """

    templates: Sequence[str]
    subject: str
    augment: Callable[[Picture, Generator], View]
    pool: int
    batch_size: int
    naming: str = "none"
    tokens: tuple[tuple[str, str], ...] = ()

    def check(self, concept: Concept) -> None:
        """Raise `ValueError` where the concept's placeholder is one of those tokens."""
        if concept.placeholder_token in dict(self.tokens):
            raise ValueError(
                f"The placeholder {concept.placeholder_token} is already taken by an augmentation: choose another name."
            )

    def pools(self, models: Models, concept: Concept, generator: Generator) -> Iterator[Latents]:
        """Encoded views for one step after the other, each time of one size: from a pool for each size, or fresh ones.

        A pool shows the pictures of its size in turn. Fresh ones draw theirs, and every step draws its size, so that
        the generator alone knows what comes next.
        """
        sizes = concept.sizes(models.resolution)
        pictures = {size: [i for i, other in enumerate(sizes) if other == size] for size in dict.fromkeys(sizes)}
        drawn, cuts = partial(choose, generator=generator), Cuts(concept, models.device)

        def encoded(size: tuple[int, int], order: Iterator[int], n: int) -> Latents:
            views = augmentation.views(concept, order, size, generator, self.augment, cuts)
            return encode_views(models, views, n)

        # A size as often as it has pictures. The only one is not drawn.
        steps = map(drawn, repeat(sizes)) if len(pictures) > 1 else repeat(sizes[0])
        if not self.pool:
            return (encoded(size, map(drawn, repeat(pictures[size])), self.batch_size) for size in steps)
        counts = {size: max(1, round(self.pool * len(own) / len(sizes))) for size, own in pictures.items()}
        pools = {size: encoded(size, cycle(own), counts[size]) for size, own in pictures.items()}
        return (pools[size] for size in steps)

    def batches(
        self,
        models: Models,
        concept: Concept,
        pools: Iterator[Latents],
        generator: Generator,
        preserved: PreservationPrompts | None = None,
        classes: ClassImages | None = None,
    ) -> Iterator[Batch]:
        """A batch per step, with `preserved` prompts and as many pictures of the class where there are any."""
        for pool in pools:
            index = torch.randint(len(pool.mean), (self.batch_size,), generator=generator)
            views = [(pool.pictures[i], pool.operations[i]) for i in index.tolist()]
            prompts = [self._prompt(concept, *view, generator) for view in views]
            ids, targets = preserved.sample(self.batch_size, generator) if preserved else (None, None)
            batch = Batch(
                latents=pool.sample(index, generator),
                posterior=pool.posterior(index),
                input_ids=models.tokenize(prompts),
                masks=None if pool.masks is None else pool.masks[index],
                preservation_ids=ids,
                preservation_targets=targets,
            )
            yield batch.with_class(classes.sample(batch, generator)) if classes else batch

    def _prompt(self, concept: Concept, picture: int, operations: tuple[str, ...], generator: Generator) -> str:
        template = concept.caption(picture) or choose(self.templates, generator)
        prompt = template.replace("{}", self.subject)
        return augmentation.describe(prompt, operations, self.naming, generator)
