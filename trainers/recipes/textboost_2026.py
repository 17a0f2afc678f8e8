"""TextBoost's 2026 revision: causality-preserved adapters (CPA), which act from the placeholder token V on.

Paper: the authors' second version, arXiv 2409.08248v2. V's vectors and low-rank adapters train, with the denoising
loss alone. With m = 1 at the first position of V and every later one up to the end token, else 0:

    y = W x + m * up(down(x))     at W = fc2 of every MLP of the text encoder; down [r, in], up [out, r]
    H_l = H + m * A_l(H)          before keys and values of cross-attention l; TextBoost++ only; A_l(H) = up(down(H))

with `down ~ normal(0, 1 / r)` and `up = 0` at first. CLIP's attention looks back only: what stands before V, and a
prompt without V, is encoded exactly as by the frozen model, so there is nothing to preserve. Presets: "2026 CPA"
(100 steps of 8 images, rank 1, adapters at 1e-4, vectors at 1e-3; 0.12 M parameters on SD 2.1) and "2026++" (the
second formula as well, 80 steps; 0.15 M).

Settings of the names that TextBoost has are declared there (`same`): bounds and help, and defaults unless one is given
here. From TextBoost also come the augmentation as a whole (`paired_views`: operations, phrases, tokens) and the choice
of text encoders (`WHICH`).

As in the authors' code the augmentation is weak (a flip with probability 0.5; with probability 0.5 a mild crop, of an
image of 1.2 times the size) and no prompt names it, timesteps are uniform, vectors longer than 0.43 are scaled back,
and "2026++" has no adapter in the last layer of the text encoder that is read (22 of SD 2.1). `augmentations = all`,
named in words, `snr_weighted` and `norm_limit = 0` are those of TextBoost.

Differences to the authors' code:
- The adapters act neither on padding nor on prompts without V; theirs do.
- Views are encoded before training: a pool of 512, not a fresh one for every step.
"""

from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from functools import partial

from torch import Generator

from ..data.concept import Concept
from ..data.context import Context
from ..data.paired_views import PairedViews
from ..models.diffusion import Models
from ..settings import part, same, setting
from ..training import causal_adapters, losses, optimizers, timesteps, trainables
from ..training.optimizers import Optimization
from ..training.stage import Stage
from ..training.step_inputs import Noise
from .textboost import WHICH, TextBoost, paired_views


@dataclass(frozen=True, kw_only=True)
class TextBoost2026:
    """Settings of the 2026 revision; the defaults are the authors'."""

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
    augmentations: str = same(TextBoost, "augmentations", "weak")
    augmentation_prompt: str = same(TextBoost, "augmentation_prompt", "words")
    snr_weighted: bool = same(TextBoost, "snr_weighted", False)
    clamp_norms: bool = same(TextBoost, "clamp_norms")
    views: int = same(TextBoost, "views")
    max_grad_norm: float = same(TextBoost, "max_grad_norm")
    weight_decay: float = same(Optimization, "weight_decay")
    text_encoder: str = same(TextBoost, "text_encoder")
    norm_limit: float = setting(
        0.43,
        "Largest norm of a learned token embedding with clamp_norms, as in the authors' code; 0 takes the vocabulary's "
        "mean norm.",
        min=0.0,
        max=100.0,
        advanced=True,
    )
    vertical_flip: bool = same(TextBoost, "vertical_flip")
    quarter_turn: bool = same(TextBoost, "quarter_turn")
    brightness: bool = same(TextBoost, "brightness")
    jpeg: bool = same(TextBoost, "jpeg")
    optimizer: str = same(Optimization, "optimizer")
    lr_scheduler: str = same(Optimization, "lr_scheduler")
    lr_warmup_steps: int = same(Optimization, "lr_warmup_steps")
    noise_offset: float = same(Noise, "noise_offset")

    needs = TextBoost.needs

    def subject(self, concept: Concept) -> str:
        """Return what `{}` in a prompt stands for: `V`, or `V C` with the class word C."""
        return concept.subject(self.with_class_word)

    def check(self, concept: Concept, known: Collection[str] = ()) -> None:
        """Raise `ValueError` where these settings cannot learn this concept, or not on this machine."""
        optimizers.check(self.optimizer)
        concept.check_single("TextBoost's 2026 revision")
        self._views(concept).check(concept)

    def _views(self, concept: Concept) -> PairedViews:
        return paired_views(self, concept)  # type: ignore[arg-type]  # the same settings as TextBoost's

    def stages(self, models: Models, concept: Concept, generator: Generator, context: Context) -> Iterator[Stage]:
        """Yield the only stage."""
        views, encoders = self._views(concept), WHICH[self.text_encoder]
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
            optimization=part(Optimization, self),
            noise=part(Noise, self),
            batches=views.batches(models, concept, pools, generator),
            first=partial(views.first, models, concept, generator),
            templates=views.templates,
            losses={"denoising": (1.0, losses.denoising)},
            timesteps=sampler(models.alphas_cumprod, generator),
            after_step=trainables.norm_clamp(tokens, self.norm_limit) if self.clamp_norms else lambda: None,
        )


REVISED = TextBoost2026()
PLUS = replace(REVISED, steps=80, cross_attention=True)
PRESETS = {"2026 CPA": REVISED, "2026++": PLUS}  # the editor would put a bare number first
