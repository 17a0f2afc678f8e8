"""Batches of augmented views with prompts that describe them, joined by class images for prior preservation.

The views are encoded ahead, so that no autoencoder runs inside a step.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import cycle, repeat

import torch
from torch import Generator, Tensor

from ..digest import choose
from ..models.diffusion import Models
from . import augmentation
from .augmentation import ImageAndMask, Phrases
from .batch import Batch
from .class_images import ClassImages
from .concept import Concept, Cuts
from .latents import Latents, View, encode_views
from .preservation import PreservationPrompts


@dataclass(frozen=True, kw_only=True)
class PairedViews:
    """Augmentation of images together with their prompts.

    Attributes:
        templates: prompts with `{}` for the subject, for images without a caption.
        subjects: what `{}` stands for, for each image.
        augment: an image and its mask to one view of it, drawn from a generator.
        pool: views that are encoded ahead and used again and again; 0 encodes fresh ones for every step.
        phrases: what names an operation in the prompt, see `augmentation.describe`.
        tokens: the operations' own tokens among these phrases, each with its initializer.
        crop: how the method's authors cut an image that is not square, for a concept that says "auto".
    """

    templates: Sequence[str]
    subjects: Sequence[str]
    augment: Callable[[ImageAndMask, Generator], View]
    pool: int
    batch_size: int
    phrases: Phrases = field(default_factory=dict)
    tokens: tuple[tuple[str, str], ...] = ()
    crop: str = "center"

    def check(self, concept: Concept) -> None:
        """Raise `ValueError` where a placeholder of the concept is one of `tokens`."""
        for token, _ in concept.words:
            if token in dict(self.tokens):
                raise ValueError(f"The placeholder {token} is the token of an augmentation: choose another one.")

    def all_prompts(self, concept: Concept) -> list[str]:
        """Return every prompt of the batches, without what names an operation."""
        prompts: list[str] = []
        for i, subject in enumerate(self.subjects):
            caption = concept.caption(i)
            prompts += [text.replace("{}", subject) for text in ([caption] if caption else self.templates)]
        return [*dict.fromkeys(prompts)]

    def pools(self, models: Models, concept: Concept, generator: Generator) -> Iterator[Latents]:
        """Yield encoded views for one step after the other, all of one size: a pool for each size, or fresh ones.

        A pool shows the images of its size in turn. Fresh views draw their images, and every step draws its size, so
        that the generator alone decides what comes next.
        """
        sizes = concept.sizes(models.resolution)
        images = {size: [i for i, other in enumerate(sizes) if other == size] for size in dict.fromkeys(sizes)}
        one_of, cuts = partial(choose, generator=generator), self._cuts(concept, models)

        def encoded(size: tuple[int, int], order: Iterator[int], n: int) -> Latents:
            views = augmentation.views(concept, order, size, generator, self.augment, cuts)
            return encode_views(models, views, n)

        # A size is as likely as it has images. A single size is not drawn.
        steps = map(one_of, repeat(sizes)) if len(images) > 1 else repeat(sizes[0])
        if not self.pool:
            return (encoded(size, map(one_of, repeat(images[size])), self.batch_size) for size in steps)
        counts = {size: max(1, round(self.pool * len(own) / len(sizes))) for size, own in images.items()}
        pools = {size: encoded(size, cycle(own), counts[size]) for size, own in images.items()}
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
        """Yield a batch per step, with `preserved` prompts and as many of `classes` where they are given."""
        for pool in pools:
            index = torch.randint(len(pool.mean), (self.batch_size,), generator=generator)
            prompts = self._prompts(concept, pool, index, partial(choose, self.templates, generator), generator)
            ids, targets = preserved.sample(self.batch_size, generator) if preserved else (None, None)
            batch = _batch(models, pool, index, prompts, generator)
            batch = replace(batch, preservation_ids=ids, preservation_targets=targets)
            yield batch.with_class(classes.sample(batch, generator)) if classes else batch

    def first(self, models: Models, concept: Concept, generator: Generator, count: int) -> Batch:
        """Return `count` new views: the first images and templates in their order, those of the first image's size."""
        sizes = concept.sizes(models.resolution)
        order = cycle(i for i, size in enumerate(sizes) if size == sizes[0])
        cuts = self._cuts(concept, models)
        views = augmentation.views(concept, order, sizes[0], generator, self.augment, cuts)
        latents, index = encode_views(models, views, count), torch.arange(count)
        prompts = self._prompts(concept, latents, index, cycle(self.templates).__next__, generator)
        return _batch(models, latents, index, prompts, generator)

    def _cuts(self, concept: Concept, models: Models) -> Cuts:
        cut = replace(concept, crop=self.crop) if concept.crop == "auto" else concept
        return Cuts(cut, models.device)

    def _prompts(
        self, concept: Concept, views: Latents, index: Tensor, template: Callable[[], str], generator: Generator
    ) -> list[str]:
        """Return the prompts of the views `index`: an image's caption, or else the next `template`."""
        prompts = []
        for i in index.tolist():
            prompt = (concept.caption(views.images[i]) or template()).replace("{}", self.subjects[views.images[i]])
            prompts.append(augmentation.describe(prompt, views.operations[i], self.phrases, generator))
        return prompts


def _batch(models: Models, views: Latents, index: Tensor, prompts: list[str], generator: Generator) -> Batch:
    return Batch(
        latents=views.sample(index, generator),
        posterior=views.posterior(index),
        input_ids=models.tokenize(prompts),
        masks=None if views.masks is None else views.masks[index],
    )
