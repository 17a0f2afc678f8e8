"""TextBoost's 2026 revision: adapters that act from the new word on; what stands before it stays exactly as it was.

Paper: the same authors' second version, arXiv 2409.08248v2. Authors' settings: rank-1 adapters at 1e-4 and the new
word's vectors at 1e-3, 100 steps of 8 pictures (preset "2026 CPA"); "2026++" also adapts what each cross-attention
reads, 80 steps. 0.12 M parameters on SD 2.1, 0.15 M with "++". Nothing else needs preserving, so there is no second
loss. Ours differs from the released code where that lets the adapters act on padding and on prompts without the word.
"""

from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace

from torch import Generator

from ..data.concept import Concept
from ..data.context import Context
from ..models.diffusion import Models
from ..settings import same, setting
from ..training import causal_adapters, losses, timesteps, trainables
from ..training.stage import Stage
from .textboost import WHICH, TextBoost, paired_views


@dataclass(frozen=True, kw_only=True)
class TextBoost2026:
    """Hyperparameters of the revision; the defaults are the authors'."""

    steps: int = same(TextBoost, "steps", 100)
    batch_size: int = same(TextBoost, "batch_size")
    adapter_learning_rate: float = setting(1e-4, "Learning rate of the adapters.", min=0.0, max=1.0)
    embedding_learning_rate: float = same(TextBoost, "embedding_learning_rate")
    templates: str = same(TextBoost, "templates")
    with_class_word: bool = same(TextBoost, "with_class_word", True)
    augmentation_p: float = same(TextBoost, "augmentation_p")
    cross_attention: bool = setting(
        False,
        "Also adapt the input of every cross-attention of the U-Net (TextBoost++): higher identity, larger file.",
    )
    adapter_rank: int = setting(1, "Rank of the adapters.", min=1, max=256, advanced=True)
    grayscale_p: float = same(TextBoost, "grayscale_p", 0.0)
    augmentations: str = same(TextBoost, "augmentations")
    augmentation_prompt: str = same(TextBoost, "augmentation_prompt", "words")
    snr_weighted: bool = same(TextBoost, "snr_weighted")
    clamp_norms: bool = same(TextBoost, "clamp_norms")
    views: int = same(TextBoost, "views")
    max_grad_norm: float = same(TextBoost, "max_grad_norm")
    weight_decay: float = same(TextBoost, "weight_decay")
    text_encoder: str = same(TextBoost, "text_encoder")

    def subject(self, concept: Concept) -> str:
        """What `{}` in a prompt stands for."""
        return concept.subject(self.with_class_word)

    def check(self, concept: Concept, known: Collection[str] = ()) -> None:
        """Raise `ValueError` where these settings cannot learn this concept."""
        paired_views(self, concept).check(concept)

    def stages(self, models: Models, concept: Concept, generator: Generator, context: Context) -> Iterator[Stage]:
        views, encoders = paired_views(self, concept), WHICH[self.text_encoder]
        words = [(concept.placeholder_token, concept.initializer), *views.tokens]
        tokens = [trainables.add_tokens(encoder, words) for encoder in models.text_encoders][encoders]
        pools = views.pools(models, concept, generator)
        adapters = causal_adapters.add_adapters(
            models, concept.placeholder_token, encoders, self.adapter_rank, generator, self.cross_attention
        )
        sampler = timesteps.snr_weighted if self.snr_weighted else timesteps.uniform
        yield Stage(
            name="textboost2026",
            steps=self.steps,
            batch_size=self.batch_size,
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
PRESETS = {"2026 CPA": REVISED, "2026++": PLUS}  # the editor would put a bare number first, as its default
