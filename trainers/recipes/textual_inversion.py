"""Textual Inversion: the placeholder token's vector trains, and nothing else.

Paper: "An Image is Worth One Word", arXiv 2208.01618, with the settings of "Is This Loss Informative?" (DVAR),
arXiv 2302.04841, whose monitors make it fast. 2 images per step, flipped at random, in 57 templates; denoising loss;
learning rate 5e-3 times the batch size. Presets: "full" (6100 steps) and "short" (475, their "few iters" baseline).
The smallest of all results: a few hundred numbers, an embedding that every program reads. Settings of the optimizer
are declared with it, `clip_*` by the CLIP that chooses an initializer (`same`).

Differences to the authors' code:
- Views are encoded before training: a pool of 128, not a fresh one for every step.
- An initializer of several tokens gives V several vectors.
"""

from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from functools import partial

from torch import Generator

from ..data import augmentation, initializer
from ..data.concept import Concept
from ..data.context import Context
from ..data.paired_views import PairedViews
from ..data.templates import TEMPLATES
from ..metrics.clip import ClipConfig
from ..models.diffusion import Models
from ..settings import part, same, setting
from ..training import losses, optimizers, timesteps, trainables
from ..training.optimizers import Optimization
from ..training.stage import Stage
from ..training.step_inputs import Noise


@dataclass(frozen=True, kw_only=True)
class TextualInversion:
    """Settings of Textual Inversion; the defaults are those of DVAR's authors."""

    steps: int = setting(6100, "Optimizer steps.", min=1, max=100_000)
    batch_size: int = setting(2, "Batch size: images per optimizer step.", min=1, max=512)
    learning_rate: float = setting(
        5e-3, "Learning rate of the token embedding for a batch size of 1.", min=0.0, max=1.0
    )
    scale_lr: bool = setting(True, "Multiply the learning rate by the batch size, as the authors do.")
    templates: str = setting(
        "imagenet",
        "Prompt templates for training: imagenet has 57, imagenet_small its 27 for photos, plain 5 simple ones, style "
        "19 such as 'a painting in the style of {}'.",
        options=("imagenet", "imagenet_small", "plain", "style"),
    )
    flip_p: float = setting(0.5, "Probability of a horizontal flip.", min=0.0, max=1.0, advanced=True)
    views: int = setting(
        128,
        "Augmented images encoded to latents before training; 0 encodes new ones in every step.",
        min=0,
        max=65536,
        advanced=True,
    )
    max_grad_norm: float = setting(
        0.0, "Clip the gradient norm to this value; 0 disables clipping.", min=0.0, max=1000.0, advanced=True
    )
    weight_decay: float = same(Optimization, "weight_decay")
    initializer_strategy: str = setting(
        "given",
        "Initializer token: the one of Load References (given), a random one, or the vocabulary's best or worst match "
        "with the reference images by CLIP.",
        options=initializer.STRATEGIES,
        advanced=True,
    )
    clip_model: str = same(ClipConfig, "clip_model")
    clip_weights: str = same(ClipConfig, "clip_weights")
    clip_download: bool = same(ClipConfig, "clip_download")
    optimizer: str = same(Optimization, "optimizer")
    lr_scheduler: str = same(Optimization, "lr_scheduler")
    lr_warmup_steps: int = same(Optimization, "lr_warmup_steps")
    noise_offset: float = same(Noise, "noise_offset")

    needs = "a token embedding that trains"

    @property
    def clip(self) -> ClipConfig | None:
        """The CLIP that chooses the initializer by score; `None` where the strategy needs none."""
        return part(ClipConfig, self) if self.initializer_strategy in ("best", "worst") else None

    @property
    def extractor_configs(self) -> tuple[ClipConfig, ...]:
        """Configs of the feature extractors that must be loaded before the stages."""
        return (self.clip,) if self.clip else ()

    def subject(self, concept: Concept) -> str:
        """Return what `{}` in a prompt stands for: `V`."""
        return concept.subject(with_class_word=False)

    def check(self, concept: Concept, known: Collection[str] = ()) -> None:
        """Raise `ValueError` where the optimizer is missing; every concept can be learned."""
        optimizers.check(self.optimizer)

    def stages(self, models: Models, concept: Concept, generator: Generator, context: Context) -> Iterator[Stage]:
        """Yield the only stage."""
        start = partial(initializer.words, self.initializer_strategy, models)
        words = [(one.placeholder_token, start(one, self.clip, generator, context)) for one in concept.members]
        rows = [trainables.add_tokens(encoder, words).rows for encoder in models.text_encoders]
        views = PairedViews(
            templates=TEMPLATES[self.templates],
            subjects=concept.subjects(with_class_word=False),
            augment=partial(augmentation.random_flip, p=self.flip_p),
            pool=self.views,
            batch_size=self.batch_size,
        )
        pools = views.pools(models, concept, generator)
        rate = self.learning_rate * (self.batch_size if self.scale_lr else 1)
        yield Stage(
            name="textual inversion",
            steps=self.steps,
            batch_size=self.batch_size,
            params=[{"params": rows, "lr": rate, "max_grad_norm": self.max_grad_norm}],
            optimization=part(Optimization, self),
            noise=part(Noise, self),
            batches=views.batches(models, concept, pools, generator),
            first=partial(views.first, models, concept, generator),
            templates=TEMPLATES[self.templates],
            losses={"denoising": (1.0, losses.denoising)},
            timesteps=timesteps.uniform(models.alphas_cumprod, generator),
        )


FULL = TextualInversion()
PRESETS = {"full": FULL, "short": replace(FULL, steps=475)}
