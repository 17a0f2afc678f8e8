"""DreamBooth-LoRA: the placeholder token's vector, and a LoRA on attention and feed-forward of the U-Net.

Papers: "DreamBooth", arXiv 2208.12242, and LoRA, arXiv 2106.09685, with the settings of "Is This Loss Informative?"
(DVAR), arXiv 2302.04841. `y = W x + B A x` on queries, keys, values and outputs of self- and cross-attention and on the
gated half of the feed-forward (GEGLU), like the default of the library in the authors' code; rank 4,
A ~ normal(0, 1 / rank), B = 0; 2 images per step, flipped at random, in 57 templates; vector and LoRA learn at 5e-4
times the batch size. Presets: "full" (1000 steps), "short" (450, their "few iters" baseline) and, ours, "attention
only", without GEGLU: 64 % of the values at SD 1.5. Without prior preservation, `prior_weight = 0`; with it

    L = L_denoising(subject) + prior_weight * L_denoising(class)

Settings of the names that Textual Inversion, prior preservation, the optimizer and the noise have are declared there
(`same`), and have their defaults unless one is given here.

Differences to the authors' code:
- An initializer of several tokens gives V several vectors.
- Views are encoded before training: a pool of 128, not a fresh one for every step.
As in DVAR's code, and other than in DreamBooth, V is a learned token and not a rare word.
"""

from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from functools import partial

from torch import Generator

from ..data import augmentation
from ..data.class_images import PriorPreservation
from ..data.concept import Concept
from ..data.context import Context
from ..data.paired_views import PairedViews
from ..data.templates import TEMPLATES
from ..models.diffusion import Models
from ..settings import part, same, setting
from ..training import losses, optimizers, timesteps, trainables
from ..training.optimizers import Optimization
from ..training.stage import Stage
from ..training.step_inputs import Noise
from .textual_inversion import TextualInversion

ATTENTION = [f"{layer}.{part}" for layer in ("attn1", "attn2") for part in ("to_q", "to_k", "to_v", "to_out.0")]
FEED_FORWARD = ["ff.net.0.proj"]  # its gated half, GEGLU


@dataclass(frozen=True, kw_only=True)
class DreamBoothLoRA:
    """Settings of DreamBooth-LoRA; the defaults are those of DVAR's authors."""

    steps: int = same(TextualInversion, "steps", 1000)
    batch_size: int = same(TextualInversion, "batch_size")
    learning_rate: float = setting(
        5e-4, "Learning rate of the LoRA and the token embedding for a batch size of 1.", min=0.0, max=1.0
    )
    scale_lr: bool = same(TextualInversion, "scale_lr")
    lora_rank: int = setting(4, "Rank and alpha of the LoRA.", min=1, max=256)
    prior_weight: float = same(PriorPreservation, "prior_weight")
    feed_forward: bool = setting(
        True, "Also train a LoRA on the U-Net's feed-forward layers, as the authors do.", advanced=True
    )
    templates: str = same(TextualInversion, "templates")
    flip_p: float = same(TextualInversion, "flip_p")
    views: int = same(TextualInversion, "views")
    class_images: int = same(PriorPreservation, "class_images")
    class_image_steps: int = same(PriorPreservation, "class_image_steps")
    max_grad_norm: float = same(TextualInversion, "max_grad_norm")
    weight_decay: float = same(Optimization, "weight_decay")
    optimizer: str = same(Optimization, "optimizer")
    lr_scheduler: str = same(Optimization, "lr_scheduler")
    lr_warmup_steps: int = same(Optimization, "lr_warmup_steps")
    noise_offset: float = same(Noise, "noise_offset")

    needs = "a token embedding that trains"

    def subject(self, concept: Concept) -> str:
        """Return what `{}` in a prompt stands for: `V`."""
        return concept.subject(with_class_word=False)

    def check(self, concept: Concept, known: Collection[str] = ()) -> None:
        """Raise `ValueError` where the optimizer is missing; every concept can be learned."""
        optimizers.check(self.optimizer)

    def stages(self, models: Models, concept: Concept, generator: Generator, context: Context) -> Iterator[Stage]:
        """Yield the only stage; with prior preservation, generate class images before it where none are given."""
        classes = part(PriorPreservation, self).images(models, concept, generator, context)
        rows = [trainables.add_tokens(encoder, concept.words).rows for encoder in models.text_encoders]
        views = PairedViews(
            templates=TEMPLATES[self.templates],
            subjects=concept.subjects(with_class_word=False),
            augment=partial(augmentation.random_flip, p=self.flip_p),
            pool=self.views,
            batch_size=self.batch_size,
        )
        pools = views.pools(models, concept, generator)
        targets = ATTENTION + (FEED_FORWARD if self.feed_forward else [])
        lora = trainables.add_lora(models.unet, targets, self.lora_rank, self.lora_rank, generator)
        rate = self.learning_rate * (self.batch_size if self.scale_lr else 1)
        prior = {"prior_preservation": (self.prior_weight, losses.prior_preservation)} if classes else {}
        yield Stage(
            name="dreambooth-lora",
            steps=self.steps,
            batch_size=self.batch_size * (2 if classes else 1),
            params=[{"params": [*rows, *lora], "lr": rate, "max_grad_norm": self.max_grad_norm}],
            optimization=part(Optimization, self),
            noise=part(Noise, self),
            batches=views.batches(models, concept, pools, generator, classes=classes),
            first=partial(views.first, models, concept, generator),
            templates=TEMPLATES[self.templates],
            losses={"denoising": (1.0, losses.denoising), **prior},
            timesteps=timesteps.uniform(models.alphas_cumprod, generator),
        )


FULL = DreamBoothLoRA()
PRESETS = {"full": FULL, "short": replace(FULL, steps=450), "attention only": replace(FULL, feed_forward=False)}
