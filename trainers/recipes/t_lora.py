"""T-LoRA: a LoRA on attention that has less to say the noisier the image is, made for a single image.

Paper: "T-LoRA: Single Image Diffusion Model Customization Without Overfitting", arXiv 2507.05964. What one image
teaches at high noise is its own layout and background; so the rank falls from `lora_rank` on a clean image to
`min_rank` in noise, and the factors start orthogonal, so that each rank that is left counts:

    y = W x + B S M_t A x - B0 S0 M_t A0 x,    r(t) = floor((T - t) / T * (r - r_min)) + r_min

on queries, keys, values and outputs of self- and cross-attention. Prompt "a photo of a V C"; V is a rare word that
does not train; denoising loss; 1 image per step, 800 steps, rank 64, r_min 32, A, S and B at 1e-4, as the authors'
command for SDXL. Settings of the names that DreamBooth-LoRA, the optimizer and the noise have are declared there
(`same`).

Transformers of flow matching train as the U-Net does: on the attention of their blocks, with the noise level in the
place of t / T, on timesteps drawn as theirs are; their gradients are checked first, as LoRA's are. Their text encoders
do not train, so V is an ordinary word there.

The MODEL keeps the schedule when it generates. A LoRA file cannot: stock loaders apply all ranks at every timestep.

Differences to the authors' code:
- V is the placeholder token, starting from the row of the word that stands in the authors' prompts ("sks"), or from the
  concept's initializer token.
- The image's latent is sampled at each step from its posterior, which is encoded once.
"""

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from functools import partial

from torch import Generator

from ..data import augmentation
from ..data.concept import Concept
from ..data.context import Context
from ..data.paired_views import PairedViews
from ..models import gradient_check
from ..models.diffusion import Models
from ..models.flow import FlowModels
from ..models.timestep_lora import RankSchedule, add_timestep_lora
from ..settings import part, same, setting
from ..training import losses, optimizers, timesteps, trainables
from ..training.optimizers import Optimization
from ..training.stage import Stage
from ..training.step_inputs import Noise
from .dreambooth_lora import ATTENTION, DreamBoothLoRA

TEMPLATES = ("a photo of a {}",)
RARE_WORD = "sks"


@dataclass(frozen=True, kw_only=True)
class TLoRA:
    """Settings of T-LoRA; the defaults are the authors'."""

    steps: int = same(DreamBoothLoRA, "steps", 800)
    batch_size: int = same(DreamBoothLoRA, "batch_size", 1)
    learning_rate: float = setting(1e-4, "Learning rate of the LoRA.", min=0.0, max=1.0)
    lora_rank: int = setting(64, "Rank of the LoRA on a clean image.", min=1, max=256)
    min_rank: int = setting(
        32, "Rank of the LoRA in pure noise; as large as lora_rank, it never falls.", min=1, max=256
    )
    flip_p: float = same(DreamBoothLoRA, "flip_p", 0.0)
    views: int = same(DreamBoothLoRA, "views", 16)
    max_grad_norm: float = same(DreamBoothLoRA, "max_grad_norm")
    weight_decay: float = same(Optimization, "weight_decay")
    optimizer: str = same(Optimization, "optimizer")
    lr_scheduler: str = same(Optimization, "lr_scheduler")
    lr_warmup_steps: int = same(Optimization, "lr_warmup_steps")
    noise_offset: float = same(Noise, "noise_offset")

    needs = ""

    def __post_init__(self):
        """Raise `ValueError` where the rank would grow with the noise."""
        if self.min_rank > self.lora_rank:
            raise ValueError(
                f"The min_rank of T-LoRA, {self.min_rank}, is above its lora_rank, {self.lora_rank}: lower it."
            )

    def subject(self, concept: Concept) -> str:
        """Return what `{}` in a prompt stands for: `V C`."""
        return concept.subject(with_class_word=True)

    def check(self, concept: Concept, known: Collection[str] = ()) -> None:
        """Raise `ValueError` where there are several subjects, or the optimizer is missing."""
        optimizers.check(self.optimizer)
        concept.check_single("T-LoRA")

    def stages(self, models: Models, concept: Concept, generator: Generator, context: Context) -> Iterator[Stage]:
        """Yield the only stage."""
        words = [(concept.placeholder_token, concept.initializer_token or RARE_WORD)]
        for encoder in models.text_encoders:
            trainables.add_tokens(encoder, words)
        views = PairedViews(
            templates=TEMPLATES,
            subjects=concept.subjects(with_class_word=True),
            augment=partial(augmentation.random_flip, p=self.flip_p),
            pool=self.views,
            batch_size=self.batch_size,
        )
        models.tokenize(views.all_prompts(concept))
        pools = views.pools(models, concept, generator)
        schedule = RankSchedule(rank=self.lora_rank, min_rank=self.min_rank)
        chosen = trainables.attention_layers(models) if isinstance(models, FlowModels) else ATTENTION
        lora = add_timestep_lora(models, chosen, schedule, generator)
        lora = gradient_check.reached(models, lora, concept.class_prompt)
        yield Stage(
            name="t-lora",
            steps=self.steps,
            batch_size=self.batch_size,
            params=[{"params": lora, "lr": self.learning_rate, "max_grad_norm": self.max_grad_norm}],
            optimization=part(Optimization, self),
            noise=part(Noise, self),
            batches=views.batches(models, concept, pools, generator),
            first=partial(views.first, models, concept, generator),
            templates=TEMPLATES,
            losses={"denoising": (1.0, losses.denoising)},
            timesteps=timesteps.natural(models, generator),
        )


PRESETS = {"single image": TLoRA()}
