"""Custom Diffusion: a word's vector, and what the U-Net's cross-attention makes of words.

Paper: "Multi-Concept Customization of Text-to-Image Diffusion", arXiv 2212.04488, with the settings of "Is This Loss
Informative?" (DVAR), arXiv 2302.04841. Authors' settings: keys and values of every cross-attention, trained whole,
which learn nothing from the prompt's start token; one of the 57 templates, drawn once, with "V C"; pictures of the
subject at random sizes, named so, the loss only where they are; beside 2 of them 2 of 200 pictures of the class, in a
loss of their own with weight 1 (prior preservation); 1e-5 times the batch size, twice that with the prior; 500 steps
(preset "full"), or 367 by their "few iters" baseline (preset "short"); gradients clipped at 1.
Ours differs in that the model at hand draws the class pictures, where theirs were searched for in the web, in that
pictures are encoded ahead, and in that a class picture is never mirrored.
"""

from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from functools import partial

from torch import Generator

from ..data import augmentation
from ..data.class_images import class_images_of
from ..data.concept import Concept
from ..data.context import Context
from ..data.paired_views import PairedViews
from ..data.templates import TEMPLATES
from ..digest import choose
from ..models.diffusion import Models
from ..settings import same, setting
from ..training import cross_attention, losses, timesteps, trainables
from ..training.stage import Stage
from .dreambooth_lora import DreamBoothLoRA
from .textboost import TextBoost
from .textual_inversion import TextualInversion

TRAINED = ("attn2.to_k", "attn2.to_v")


@dataclass(frozen=True, kw_only=True)
class CustomDiffusion:
    """Hyperparameters of Custom Diffusion; the defaults are those of DVAR's authors."""

    steps: int = same(TextualInversion, "steps", 500)
    batch_size: int = setting(
        2, "Batch size: images of the subject per optimizer step; prior preservation adds as many class images.", min=1,
        max=512,
    )  # fmt: skip
    learning_rate: float = setting(
        1e-5,
        "Learning rate of weights and token embedding for a batch size of 1; doubled with prior preservation.",
        min=0.0,
        max=1.0,
    )
    scale_lr: bool = same(TextualInversion, "scale_lr")
    prior_weight: float = same(DreamBoothLoRA, "prior_weight", 1.0)
    class_images: int = same(DreamBoothLoRA, "class_images")
    class_image_steps: int = same(DreamBoothLoRA, "class_image_steps")
    templates: str = setting(
        "imagenet",
        "Prompt templates, one of which is picked at random for the whole training: imagenet has 57, imagenet_small "
        "its 27 for photos, plain 5 simple ones.",
        options=("imagenet", "imagenet_small", "plain"),
        advanced=True,
    )
    flip_p: float = same(TextualInversion, "flip_p")
    random_size: bool = setting(
        True,
        "Randomly resize the subject and name its size in the prompt; the loss ignores the blank canvas around it.",
        advanced=True,
    )
    views: int = same(TextualInversion, "views", 512)
    max_grad_norm: float = same(TextualInversion, "max_grad_norm", 1.0)
    weight_decay: float = same(TextBoost, "weight_decay")

    def subject(self, concept: Concept) -> str:
        """What `{}` in a prompt stands for."""
        return concept.subject(with_class_word=True)

    def check(self, concept: Concept, known: Collection[str] = ()) -> None:
        """Raise `ValueError` where these settings cannot learn this concept; they always can."""

    def stages(self, models: Models, concept: Concept, generator: Generator, context: Context) -> Iterator[Stage]:
        classes = class_images_of(
            models, concept, context,
            seed=generator.initial_seed(), count=self.class_images, steps=self.class_image_steps,
        ) if self.prior_weight > 0 else None  # fmt: skip
        words = [(concept.placeholder_token, concept.initializer)]
        rows = [trainables.add_tokens(encoder, words).rows for encoder in models.text_encoders]
        augment = augmentation.resized if self.random_size else augmentation.random_flip
        views = PairedViews(
            templates=(choose(TEMPLATES[self.templates], generator),),
            subject=self.subject(concept),
            augment=partial(augment, p=self.flip_p),
            pool=self.views,
            batch_size=self.batch_size,
            naming="words",
        )
        pools = views.pools(models, concept, generator)
        weights = [parameter for name in TRAINED for parameter in trainables.select(models, name)]
        rate = self.learning_rate * (self.batch_size if self.scale_lr else 1) * (2 if classes else 1)
        kept = {"prior_preservation": (self.prior_weight, losses.prior_preservation)} if classes else {}
        with cross_attention.first_token_without_gradient(models.unet):
            yield Stage(
                name="custom diffusion",
                steps=self.steps,
                batch_size=self.batch_size * (2 if classes else 1),
                params=[{"params": [*rows, *weights], "lr": rate, "max_grad_norm": self.max_grad_norm}],
                weight_decay=self.weight_decay,
                batches=views.batches(models, concept, pools, generator, classes=classes),
                losses={"denoising": (1.0, losses.denoising), **kept},
                timesteps=timesteps.uniform(models.alphas_cumprod, generator),
            )


FULL = CustomDiffusion()
PRESETS = {"full": FULL, "short": replace(FULL, steps=367)}
