"""Previews: images generated during training."""

from dataclasses import dataclass

from einops import rearrange
from PIL import Image

from ..device import SingleDevice, is_out_of_memory
from ..images import to_pil
from ..models import sampler
from ..models.diffusion import Models
from .run import Run


@dataclass(frozen=True, kw_only=True)
class Preview:
    """Settings of previews, which never change what is learned."""

    prompts: tuple[str, ...] = ()  # `{}` stands for the subject
    every: int = 50  # steps; 0 for none
    images_per_prompt: int = 1
    seed: int = 0
    steps: int = 20
    guidance: float = 7.5

    @property
    def used_prompts(self) -> tuple[str, ...]:
        """The prompts, or none where no preview is generated."""
        return self.prompts if self.every else ()

    def due(self, step: int, last: int) -> bool:
        """Return whether a preview follows this step."""
        return bool(self.used_prompts) and (step % self.every == 0 or step == last)


def draw(models: Models, run: Run, preview: Preview) -> Image.Image:
    """Generate a preview: a row per prompt, a column per seed, at the size at which the first image is trained."""
    subject = run.recipe.subject(run.concept)
    prompts = [p.replace("{}", subject) for p in preview.prompts for _ in range(preview.images_per_prompt)]
    seeds = [preview.seed + i for _ in preview.prompts for i in range(preview.images_per_prompt)]
    size = run.concept.sizes(models.resolution)[0]
    with SingleDevice(device=models.device, dtype=run.dtype).autocast():
        images = sampler.sample(models, prompts, seeds, size=size, steps=preview.steps, guidance=preview.guidance)
    return to_pil(rearrange(images, "(r c) d h w -> d (r h) (c w)", r=len(preview.prompts)))


def draw_if_it_fits(models: Models, run: Run, preview: Preview) -> Image.Image | None:
    """Generate a preview, or `None` where memory runs out even with one image at a time: training continues."""
    try:
        return draw(models, run, preview)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
    return None
