"""AttnDreamBooth: first the word, then what the cross-attention makes of it, then the subject itself.

Paper: "AttnDreamBooth: Towards Text-Aligned Personalized Text-to-Image Generation", arXiv 2406.05000. Authors'
settings: SD 2.1-base, one prompt "a photo of a V C" throughout; stage 1 trains V's vector (60 steps, 1e-3), stage 2
every weight of the cross-attentions (100 steps, 2e-5), stage 3 the whole U-Net (500 steps, 2e-6; preset "fast": 200
steps of 4 at 1e-5). In every stage a regulariser draws the attention to V towards the attention to the class word C.
Ours differs where the released code leaves black corners in turned pictures: they are filled by reflection. Whole
weights need 16 bytes of memory each, 10 with `optimizer = adamw8bit`; `fine_tuning = lora` makes small files and fits
small cards.
"""

from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from functools import partial

from torch import Generator
from torch.nn import Parameter

from ..data import augmentation
from ..data.concept import Concept
from ..data.context import Context
from ..data.paired_views import PairedViews
from ..models.diffusion import Models
from ..settings import same, setting
from ..training import cross_attention, losses, optimizers, timesteps, trainables
from ..training.cross_attention import AttentionMaps
from ..training.objective import Loss
from ..training.stage import Stage
from .textboost import TextBoost

PROMPT = "a photo of a {}"
RUNS = {"all": "123", "1": "1", "2": "2", "3": "3", "1+2": "12", "2+3": "23"}
CROSS_ATTENTION = ["attn2.to_q", "attn2.to_k", "attn2.to_v", "attn2.to_out.0"]
OTHER_LAYERS = ["attn1.to_q", "attn1.to_k", "attn1.to_v", "attn1.to_out.0", "ff.net.0.proj", "ff.net.2"]
CLASS_TOKENS = {"first": slice(1), "mean": slice(None)}


@dataclass(frozen=True, kw_only=True)
class AttnDreamBooth:
    """Hyperparameters of AttnDreamBooth; the defaults are the authors'."""

    run_stages: str = setting(
        "all", "Which stages to train; stages 2 and 3 continue from the placeholder token of an earlier training.",
        options=tuple(RUNS),
    )  # fmt: skip
    steps_1: int = setting(60, "Optimizer steps of stage 1, which trains the token embedding.", min=1, max=100_000)
    steps_2: int = setting(
        100, "Optimizer steps of stage 2, which trains the cross-attention layers.", min=1, max=100_000
    )
    steps_3: int = setting(500, "Optimizer steps of stage 3, which trains the whole U-Net.", min=1, max=100_000)
    fine_tuning: str = setting(
        "full",
        "Stages 2 and 3 train the weights themselves, as in the paper, or a LoRA for less memory and small files.",
        options=("full", "lora"),
    )  # fmt: skip
    lora_rank: int = setting(16, "Rank and alpha of the LoRA.", min=1, max=256)
    learning_rate_1: float = setting(
        1e-3, "Learning rate of the token embedding in stage 1.", min=0.0, max=1.0, advanced=True
    )
    learning_rate_2: float = setting(
        2e-5, "Learning rate of the cross-attention layers in stage 2.", min=0.0, max=1.0, advanced=True
    )
    learning_rate_3: float = setting(2e-6, "Learning rate of the U-Net in stage 3.", min=0.0, max=1.0, advanced=True)
    batch_size_1: int = setting(8, "Batch size of stage 1: images per optimizer step.", min=1, max=512, advanced=True)
    batch_size_2: int = setting(8, "Batch size of stage 2: images per optimizer step.", min=1, max=512, advanced=True)
    batch_size_3: int = setting(8, "Batch size of stage 3: images per optimizer step.", min=1, max=512, advanced=True)
    mean_weight_1: float = setting(
        0.1,
        "Stage 1: weight of the attention-mean regularizer, which equalizes the mean attention to placeholder token "
        "and class word.", min=0.0, max=1000.0, advanced=True,
    )  # fmt: skip
    variance_weight_1: float = setting(
        0.0,
        "Stage 1: weight of the attention-variance regularizer, which equalizes the spread of both attention maps.",
        min=0.0,
        max=1000.0,
        advanced=True,
    )
    mean_weight_2: float = setting(
        2.0, "Stage 2: weight of the attention-mean regularizer.", min=0.0, max=1000.0, advanced=True
    )
    variance_weight_2: float = setting(
        5.0, "Stage 2: weight of the attention-variance regularizer.", min=0.0, max=1000.0, advanced=True
    )
    mean_weight_3: float = setting(
        2.0, "Stage 3: weight of the attention-mean regularizer.", min=0.0, max=1000.0, advanced=True
    )
    variance_weight_3: float = setting(
        5.0, "Stage 3: weight of the attention-variance regularizer.", min=0.0, max=1000.0, advanced=True
    )
    class_tokens: str = setting(
        "first", "Which token of a longer class word is regularized against: the first, as in the paper, or the mean.",
        options=tuple(CLASS_TOKENS), advanced=True,
    )  # fmt: skip
    rotation_p: float = setting(0.75, "Probability of a random rotation.", min=0.0, max=1.0, advanced=True)
    rotation_degrees: float = setting(
        45.0,
        "Largest angle of the random rotation, in degrees, in either direction.",
        min=0.0,
        max=180.0,
        advanced=True,
    )
    flip_p: float = setting(0.25, "Probability of a horizontal flip.", min=0.0, max=1.0, advanced=True)
    views: int = setting(512, "Augmented images encoded to latents before training.", min=1, max=65536, advanced=True)
    max_grad_norm: float = setting(
        0.0,
        "Clip the gradient norm to this value; 0 disables clipping, as in the paper.",
        min=0.0,
        max=1000.0,
        advanced=True,
    )
    weight_decay: float = same(TextBoost, "weight_decay")
    optimizer: str = setting(
        "adamw", "AdamW, or AdamW with 8-bit moments, which needs less memory and the package bitsandbytes.",
        options=tuple(optimizers.MOMENT_BITS), advanced=True,
    )  # fmt: skip

    @property
    def steps(self) -> int:
        """Of all stages that run."""
        return sum(getattr(self, f"steps_{number}") for number in RUNS[self.run_stages])

    def subject(self, concept: Concept) -> str:
        """What `{}` in a prompt stands for."""
        return concept.subject(with_class_word=True)

    def check(self, concept: Concept, known: Collection[str] = ()) -> None:
        """Raise `ValueError` where these settings cannot learn this concept, or not on this machine.

        Args:
            known: words that were learned earlier in the graph.
        """
        optimizers.check(self.optimizer)
        token = concept.placeholder_token
        first = RUNS[self.run_stages][0]
        if first != "1" and token not in known:
            raise ValueError(
                f"Stage {first} goes on from a learned word, and this CLIP does not know {token}: run stage 1 before "
                "it, or connect the CLIP that an earlier Train returned."
            )

    def stages(self, models: Models, concept: Concept, generator: Generator, context: Context) -> Iterator[Stage]:
        words = [(concept.placeholder_token, concept.initializer)]
        rows = [trainables.add_tokens(encoder, words).rows for encoder in models.text_encoders]
        random_rotation = partial(
            augmentation.random_rotation, p=self.rotation_p, degrees=self.rotation_degrees, flip_p=self.flip_p
        )
        views = PairedViews(
            templates=(PROMPT,), subject=self.subject(concept), augment=random_rotation, pool=self.views, batch_size=0
        )
        pools = views.pools(models, concept, generator)
        with cross_attention.record_cross_attention(models.unet) as maps:
            for number in map(int, RUNS[self.run_stages]):
                size = self._of(number, "batch_size")
                params = rows if number == 1 else self._unet(models, number, generator)
                rate = self._of(number, "learning_rate")
                yield Stage(
                    name=f"attndreambooth {number}",
                    steps=self._of(number, "steps"),
                    batch_size=size,
                    params=[{"params": params, "lr": rate, "max_grad_norm": self.max_grad_norm}],
                    weight_decay=self.weight_decay,
                    moment_bits=optimizers.MOMENT_BITS[self.optimizer],
                    batches=replace(views, batch_size=size).batches(models, concept, pools, generator),
                    losses={"denoising": (1.0, losses.denoising), **self._regularizers(models, concept, maps, number)},
                    timesteps=timesteps.uniform(models.alphas_cumprod, generator),
                    after_pass=maps.clear,
                )

    def _of(self, number: int, name: str):
        """A setting of one stage."""
        return getattr(self, f"{name}_{number}")

    def _unet(self, models: Models, number: int, generator: Generator) -> list[Parameter]:
        """What stage 2 or 3 trains of the U-Net."""
        if self.fine_tuning == "full":
            return trainables.select(models, ".attn2." if number == 2 else "")
        targets = CROSS_ATTENTION if number == 2 else CROSS_ATTENTION + OTHER_LAYERS
        return trainables.add_lora(models.unet, targets, self.lora_rank, self.lora_rank, generator)

    def _regularizers(
        self, models: Models, concept: Concept, maps: AttentionMaps, number: int
    ) -> dict[str, tuple[float, Loss]]:
        tokenizer = models.text_encoders[-1].tokenizer
        noun = tokenizer.encode_words(concept.class_word)[CLASS_TOKENS[self.class_tokens]]
        alike = partial(
            losses.AttentionRegularization,
            maps=maps,
            placeholder=tuple(tokenizer.placeholders[concept.placeholder_token]),
            class_word=tuple(noun),
            batch_size=self._of(number, "batch_size"),
        )
        weights = {"means": self._of(number, "mean_weight"), "variances": self._of(number, "variance_weight")}
        return {f"attention_{name}": (weight, alike(statistic=name)) for name, weight in weights.items() if weight}


PAPER = AttnDreamBooth()
FAST = replace(PAPER, steps_3=200, batch_size_3=4, learning_rate_3=1e-5)
PRESETS = {"paper": PAPER, "fast": FAST}
