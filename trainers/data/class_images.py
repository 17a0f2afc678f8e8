"""Pictures of the class, for prior preservation: the user's own, or drawn by the model itself before it changes.

What a model draws is rounded to 8 bits, as a PNG holds it, so that pictures that were kept are those that would be
drawn again, bit for bit.
"""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from PIL import Image
from torch import Generator, Tensor

from .. import files
from ..digest import digest_of
from ..images import cut, pixels, to_pil
from ..models import sampler
from ..models.diffusion import Models
from ..models.fingerprint import fingerprint
from .batch import Batch
from .concept import Concept
from .context import Context
from .latents import Latents, View, encode_views

CHUNK = 8  # pictures drawn together; the same ones always, because rounding depends on a picture's neighbours


@dataclass(frozen=True, kw_only=True)
class ClassImages:
    """Encoded pictures of the class and their prompts, from which a step draws some."""

    latents: dict[tuple[int, int], Latents]  # by height and width of the latents
    input_ids: Tensor  # [n, E, 77]

    def sample(self, batch: Batch, generator: Generator) -> Batch:
        """As many as the batch has samples, of its size."""
        index = torch.randint(len(self.input_ids), (len(batch),), generator=generator)
        encoded = self.latents[tuple(batch.latents.shape[-2:])]
        return Batch(
            latents=encoded.sample(index, generator),
            posterior=encoded.posterior(index),
            input_ids=self.input_ids[index],
        )


def class_images_of(
    models: Models, concept: Concept, context: Context, *, seed: int, count: int, steps: int
) -> ClassImages:
    """Encode the concept's class images; where it has none, generate `count` in `steps` sampler steps.

    To be called before anything of the models changes. What is generated depends on `seed`, not on a generator's state.
    """
    images, prompts = concept.class_images, concept.class_prompts()
    if not images:
        size = (concept.at_resolution(models.resolution),) * 2
        images = ClassImageGenerator(
            models=models, context=context, prompt=concept.class_prompt, size=size, seed=seed, count=count, steps=steps
        )()
        prompts = [concept.class_prompt] * count
    encoded = {}
    for size in dict.fromkeys(concept.sizes(models.resolution)):
        context.notice(f"encoding {len(images)} class pictures")
        views = (View(pixels=cut(image, *size, 0.5), mask=None) for image in images)
        latents = encode_views(models, views, len(images))
        encoded[tuple(latents.mean.shape[-2:])] = latents
    return ClassImages(latents=encoded, input_ids=models.tokenize(prompts))


@dataclass(kw_only=True)
class ClassImageGenerator:
    """Pictures of one prompt by the model itself."""

    models: Models
    context: Context
    prompt: str
    size: tuple[int, int]
    seed: int
    count: int
    steps: int

    def __call__(self) -> tuple[Tensor, ...]:
        """`count` pictures `[3, *size]`, those that an earlier run kept read again."""
        pictures = []
        for start in range(0, self.count, CHUNK):
            self.context.notice(f"class pictures: {start} of {self.count}")
            numbers = range(start, min(start + CHUNK, self.count))
            pictures += self._read(numbers) or self._draw(numbers)
        return tuple(pictures)

    @cached_property
    def folder(self) -> Path | None:
        """Named by all that decides how the pictures look."""
        if self.context.cache is None:
            return None
        numbers = (*self.size, self.count, self.seed, self.steps)
        words = ["class pictures", fingerprint(self.models), str(self.models.unet.dtype), self.prompt]
        return self.context.cache / digest_of([], [*words, *map(str, numbers)])

    def _draw(self, numbers: range) -> list[Tensor]:
        seeds = [(self.seed + number) % 2**63 for number in numbers]
        drawn = sampler.sample(
            self.models, [self.prompt] * len(seeds), seeds, size=self.size, steps=self.steps, batch_size=CHUNK
        )
        pictures = [to_pil(picture) for picture in drawn]
        for number, picture in zip(numbers, pictures, strict=True):
            self._keep(number, picture)
        return [pixels(picture) for picture in pictures]

    def _keep(self, number: int, picture: Image.Image) -> None:
        if self.folder:
            self.folder.mkdir(parents=True, exist_ok=True)
            files.save_png(picture, self.folder / f"{number:04d}.png")

    def _read(self, numbers: range) -> list[Tensor]:
        """None of them unless all are there."""
        if not self.folder:
            return []
        try:
            return [pixels(Image.open(self.folder / f"{number:04d}.png").convert("RGB")) for number in numbers]
        except (OSError, SyntaxError, ValueError):  # what Pillow says of a damaged file
            return []
