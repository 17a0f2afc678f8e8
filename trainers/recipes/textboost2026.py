"""TextBoost's 2026 revision: adapters that act from the new word on; what stands before it stays exactly as it was.

Paper: the same authors' second version, arXiv 2409.08248v2. Authors' settings: rank-1 adapters at 1e-4 and the new
word's vectors at 1e-3, 100 steps of 8 pictures (preset "2026"); "2026++" also adapts what each cross-attention reads,
80 steps. 0.12 M parameters on SD 2.1, 0.15 M with "++". Nothing else needs to be preserved, so there is no second loss.
Ours differs from the released code where that lets the adapters act on padding, and on prompts without the word.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from torch import Generator

from .. import augmentation, causal, losses, timesteps, trainables
from ..data import TEMPLATES, Concept
from ..loop import Stage
from ..models import Models
from ..views import PairedViews
from .textboost import WHICH, setting


@dataclass(frozen=True, kw_only=True)
class TextBoost2026:
    """Hyperparameters of the revision; the defaults are the authors'."""

    steps: int = setting(100, "Optimizer steps. The paper uses 100, with adapters in the U-Net 80.", min=1, max=100_000)
    batch_size: int = setting(8, "Pictures per step.", min=1, max=512)
    adapter_learning_rate: float = setting(1e-4, "Learning rate of the adapters.", min=0.0, max=1.0)
    embedding_learning_rate: float = setting(1e-3, "Learning rate of the new token vectors.", min=0.0, max=1.0)
    templates: str = setting(
        "imagenet_small",
        "Prompts around the subject: 27 photo templates, or five plain ones.",
        options=tuple(TEMPLATES),
    )
    with_class_word: bool = setting(True, "Train with the class word after the placeholder: '<dog> dog'.")
    augmentation_p: float = setting(0.5, "Probability of a geometric change, and of a collage.", min=0.0, max=1.0)
    cross_attention: bool = setting(
        False,
        "Also adapt what each cross-attention of the U-Net reads (TextBoost++): more of the subject, larger file.",
    )
    adapter_rank: int = setting(1, "Rank of the adapters.", min=1, max=256, advanced=True)
    grayscale_p: float = setting(0.0, "Probability of a grayscale picture.", min=0.0, max=1.0, advanced=True)
    augmentations: str = setting(
        "all",
        "Changes a picture may undergo besides grayscale: scale, crop, shift, flip and collage, or only the flip.",
        options=tuple(augmentation.GEOMETRY),
        advanced=True,
    )
    augmentation_prompt: str = setting(
        "words",
        "How prompts name the change of a picture: in plain words, or not at all.",
        options=("words", "none"),
        advanced=True,
    )
    snr_weighted: bool = setting(True, "Train noisy timesteps more often, as in the paper.", advanced=True)
    clamp_norms: bool = setting(
        True, "Scale new token vectors back to the vocabulary's mean length after each step.", advanced=True
    )
    views: int = setting(
        512, "Augmented views encoded before training; 0 encodes fresh ones in every step.", min=0, max=65536,
        advanced=True,
    )  # fmt: skip
    max_grad_norm: float = setting(
        1.0, "Clip the adapters' gradient to this norm; 0 does not clip.", min=0.0, max=1000.0, advanced=True
    )
    weight_decay: float = setting(1e-2, "AdamW's weight decay.", min=0.0, max=1.0, advanced=True)
    text_encoder: str = setting(
        "second",
        "Which text encoder of SDXL learns; the other reads the new word as the initializer.",
        options=tuple(WHICH),
        advanced=True,
    )

    def subject(self, concept: Concept) -> str:
        """What `{}` in a prompt stands for."""
        return concept.subject(self.with_class_word)

    def check(self, concept: Concept) -> None:
        """Every concept that is one can be learned."""

    def stages(self, models: Models, concept: Concept, generator: Generator) -> Iterator[Stage]:
        words, encoders = [(concept.placeholder_token, concept.initializer)], WHICH[self.text_encoder]
        tokens = [trainables.add_tokens(encoder, words) for encoder in models.text_encoders][encoders]
        views = PairedViews.of(self, concept)
        pools = views.pools(models, concept, generator)
        adapters = causal.add_adapters(
            models, concept.placeholder_token, encoders, self.adapter_rank, generator, self.cross_attention
        ).parameters()
        sampler = timesteps.snr_weighted if self.snr_weighted else timesteps.uniform
        yield Stage(
            name="textboost2026",
            steps=self.steps,
            params=[
                {"params": [embedding.rows for embedding in tokens], "lr": self.embedding_learning_rate},
                {"params": adapters, "lr": self.adapter_learning_rate, "max_grad_norm": self.max_grad_norm},
            ],
            weight_decay=self.weight_decay,
            batches=views.batches(models, concept, pools, generator),
            losses={"denoising": (1.0, losses.denoising)},
            timesteps=sampler(models.alphas_cumprod, generator),
            after_step=trainables.norm_clamp(tokens) if self.clamp_norms else lambda: None,
        )


REVISED = TextBoost2026()
PLUS = replace(REVISED, steps=80, cross_attention=True)
PRESETS = {"2026": REVISED, "2026++": PLUS}
