"""LoRA: low-rank adapters on a diffusion model's linear layers, and nothing else; for every family that can be trained.

LoRA, arXiv 2106.09685, with the prompts and the prior preservation of DreamBooth, arXiv 2208.12242. `y = W x + B A x`
on all linear layers of the transformer blocks, or on those that a pattern names; rank 16, A ~ normal(0, 1 / rank),
B = 0. One image per step in five plain templates, "a photo of V dog" with the trigger word V and the class word, or in
the images' own captions; learning rate 1e-4, 1000 steps. The text encoders stay frozen, so V is an ordinary word,
whatever tokens it has, and each prompt is encoded once. Stable Diffusion draws its timesteps uniformly, transformers
of flow matching theirs logit-normally in the model's own shift, as they were trained (`timesteps.natural`). With prior
preservation

    L = L_denoising(subject) + prior_weight * L_denoising(class)

Presets: "full" and, for a look after a few minutes, "short" (300 steps at three times the rate). Settings of the names
that other methods have are declared there (`same`).

Differences to DreamBooth:
- The base model's weights stay frozen, and V may be any word.
- Views are encoded before training: a pool of 128 crops and flips, not a fresh one for every step.
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
from ..models import gradient_check
from ..models.diffusion import Models
from ..settings import part, same, setting
from ..training import losses, optimizers, timesteps, trainables
from ..training.optimizers import Optimization
from ..training.stage import Stage
from ..training.step_inputs import Noise
from .dreambooth_lora import DreamBoothLoRA
from .textual_inversion import TextualInversion


@dataclass(frozen=True, kw_only=True)
class LoRA:
    """Settings of LoRA."""

    steps: int = same(TextualInversion, "steps", 1000)
    batch_size: int = same(TextualInversion, "batch_size", 1)
    learning_rate: float = setting(1e-4, "Learning rate of the LoRA.", min=0.0, max=1.0)
    lora_rank: int = same(DreamBoothLoRA, "lora_rank", 16)
    prior_weight: float = same(PriorPreservation, "prior_weight")
    layers: str = setting(
        "",
        "Linear layers to adapt: patterns of their names, separated by commas, such as *attn* or *.mlp.*; empty for "
        "all of the transformer blocks.",
        advanced=True,
    )
    templates: str = same(TextualInversion, "templates", "plain")
    flip_p: float = same(TextualInversion, "flip_p")
    views: int = same(TextualInversion, "views")
    class_images: int = same(PriorPreservation, "class_images", 50)
    class_image_steps: int = same(PriorPreservation, "class_image_steps")
    class_image_guidance: float = setting(
        4.0, "Guidance scale (CFG) of each generated class image; 1 for distilled models.", min=1.0, max=30.0,
        advanced=True,
    )  # fmt: skip
    max_grad_norm: float = same(TextualInversion, "max_grad_norm", 1.0)
    weight_decay: float = same(Optimization, "weight_decay")
    optimizer: str = same(Optimization, "optimizer")
    lr_scheduler: str = same(Optimization, "lr_scheduler")
    lr_warmup_steps: int = same(Optimization, "lr_warmup_steps")
    noise_offset: float = same(Noise, "noise_offset")

    needs = ""

    def subject(self, concept: Concept) -> str:
        """Return what `{}` in a prompt stands for: `V dog`."""
        return concept.subject(with_class_word=True)

    def check(self, concept: Concept, known: Collection[str] = ()) -> None:
        """Raise `ValueError` where the optimizer is missing; every concept can be learned."""
        optimizers.check(self.optimizer)

    def stages(self, models: Models, concept: Concept, generator: Generator, context: Context) -> Iterator[Stage]:
        """Yield the only stage; with prior preservation, generate class images before it where none are given."""
        classes = part(PriorPreservation, self).images(models, concept, generator, context, self.class_image_guidance)
        views = PairedViews(
            templates=TEMPLATES[self.templates],
            subjects=concept.subjects(with_class_word=True),
            augment=partial(augmentation.random_flip, p=self.flip_p),
            pool=self.views,
            batch_size=self.batch_size,
        )
        models.tokenize(views.all_prompts(concept))
        pools = views.pools(models, concept, generator)
        chosen = trainables.layers(models, self.layers)
        lora = trainables.add_lora(models.unet, chosen, self.lora_rank, self.lora_rank, generator)
        lora = gradient_check.reached(models, lora, concept.class_prompt)
        prior = {"prior_preservation": (self.prior_weight, losses.prior_preservation)} if classes else {}
        yield Stage(
            name="lora",
            steps=self.steps,
            batch_size=self.batch_size * (2 if classes else 1),
            params=[{"params": lora, "lr": self.learning_rate, "max_grad_norm": self.max_grad_norm}],
            optimization=part(Optimization, self),
            noise=part(Noise, self),
            batches=views.batches(models, concept, pools, generator, classes=classes),
            first=partial(views.first, models, concept, generator),
            templates=TEMPLATES[self.templates],
            losses={"denoising": (1.0, losses.denoising), **prior},
            timesteps=timesteps.natural(models, generator),
        )


FULL = LoRA()
PRESETS = {"full": FULL, "short": replace(FULL, steps=300, learning_rate=3e-4)}
