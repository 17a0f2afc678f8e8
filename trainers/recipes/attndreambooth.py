"""AttnDreamBooth: the placeholder token, then the cross-attention, then the whole U-Net, in three stages.

Paper: "AttnDreamBooth: Towards Text-Aligned Personalized Text-to-Image Generation", arXiv 2406.05000.
V is the placeholder token, C the class word behind it. One prompt throughout: "a photo of a V C". V has one vector,
which starts from the first token of its initializer, and of C the first token counts, like in the authors' code;
`vectors` and `class_tokens = mean` take more.

    stage  what trains                      steps  learning rate  weights of the regularizer (mean, variance)
    1      V's vector                          60  1e-3           0.1, 0
    2      every weight of cross-attention    100  2e-5           2, 5
    3      the whole U-Net                    500  2e-6           2, 5      preset "fast": 200 steps of 4 images, 1e-5

Each stage minimizes `L_denoising + w_mean R_mean + w_variance R_variance`. The regularizer draws the attention to V
towards the attention to C, and both sides carry gradient:

    R_s = mean over layers l of  sum over samples of (s_l(V) - s_l(C))^2

with s_l(token) the mean or the unbiased variance of the token's cross-attention probabilities in layer l, over heads
and positions of the image; of several vectors of V the mean of their squares.

Differences to the authors' code:
- A rotated image is shrunk until all of it is seen, as theirs on a canvas that expands (mean scale 0.794), but what
  is around it is filled by reflection. Theirs leaves black corners.
- Views are encoded before training: a pool of 512, not a fresh one for every step.
- SD 1.x and SDXL train as well; theirs is for SD 2.1-base.
- `fine_tuning = lora`, the choice of `optimizer`, `run_stages`, clipping of the gradient and prior preservation, in
  stages 2 and 3, are ours; off by default.

Whole weights need 16 bytes of memory each, 10 with `optimizer = adamw8bit`; `fine_tuning = lora` makes small files and
fits small cards. The optimizer and the schedule of the learning rates, which each stage
begins again, are declared with the optimizers (`same`).
"""

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, replace
from functools import partial

from torch import Generator
from torch.nn import Parameter

from ..data import augmentation
from ..data.class_images import ClassImages, PriorPreservation
from ..data.concept import Concept
from ..data.context import Context
from ..data.latents import Latents
from ..data.paired_views import PairedViews
from ..models.diffusion import Models
from ..settings import part, same, setting
from ..training import cross_attention, losses, optimizers, timesteps, trainables
from ..training.cross_attention import AttentionMaps
from ..training.optimizers import Optimization
from ..training.stage import Stage
from ..training.step_inputs import Noise

PROMPT = "a photo of a {}"
# Setting `run_stages` -> the stages that run.
RUNS = {"all": "123", "1": "1", "2": "2", "3": "3", "1+2": "12", "2+3": "23"}
# Layers of the LoRA where `fine_tuning` is "lora": stage 2 has the first, stage 3 both.
CROSS_ATTENTION = ["attn2.to_q", "attn2.to_k", "attn2.to_v", "attn2.to_out.0"]
OTHER_LAYERS = ["attn1.to_q", "attn1.to_k", "attn1.to_v", "attn1.to_out.0", "ff.net.0.proj", "ff.net.2"]
# Which tokens of the class word the regularizer counts.
CLASS_TOKENS = {"first": slice(1), "mean": slice(None)}


@dataclass(frozen=True, kw_only=True)
class AttnDreamBooth:
    """Settings of AttnDreamBooth; the defaults are the paper's."""

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
    rotation_p: float = setting(
        0.75,
        "Probability of a random rotation, which also shrinks the image so that all of it is seen.",
        min=0.0,
        max=1.0,
        advanced=True,
    )
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
    weight_decay: float = same(Optimization, "weight_decay")
    optimizer: str = same(Optimization, "optimizer")
    vectors: int = setting(
        1,
        "Vectors of the placeholder token at most, from the first tokens of its initializer: 1 as in the authors' "
        "code; 0 takes one for each token.",
        min=0,
        max=trainables.MOST_VECTORS,
        advanced=True,
    )
    lr_scheduler: str = same(Optimization, "lr_scheduler")
    lr_warmup_steps: int = same(Optimization, "lr_warmup_steps")
    noise_offset: float = same(Noise, "noise_offset")
    prior_weight: float = same(PriorPreservation, "prior_weight")
    class_images: int = same(PriorPreservation, "class_images")
    class_image_steps: int = same(PriorPreservation, "class_image_steps")

    needs = "a token embedding that trains and a U-Net's cross-attention"

    @property
    def steps(self) -> int:
        """Optimizer steps of all stages that run."""
        steps = {"1": self.steps_1, "2": self.steps_2, "3": self.steps_3}
        return sum(steps[number] for number in RUNS[self.run_stages])

    def subject(self, concept: Concept) -> str:
        """Return what `{}` in a prompt stands for: `V C`."""
        return concept.subject(with_class_word=True)

    def check(self, concept: Concept, known: Collection[str] = ()) -> None:
        """Raise `ValueError` where these settings cannot learn this concept, or not on this machine.

        Args:
            known: placeholder tokens that were learned earlier in the graph.
        """
        optimizers.check(self.optimizer)
        concept.check_single("AttnDreamBooth")
        token = concept.placeholder_token
        first = RUNS[self.run_stages][0]
        if first != "1" and token not in known:
            raise ValueError(
                f"Stage {first} continues from a learned placeholder token, and this CLIP does not know {token}: run "
                "stage 1 before it, or connect the CLIP that an earlier Train returned."
            )

    def stages(self, models: Models, concept: Concept, generator: Generator, context: Context) -> Iterator[Stage]:
        """Yield the stages that run, each one below the other."""
        classes = part(PriorPreservation, self).images(models, concept, generator, context)
        words = [(concept.placeholder_token, concept.initializer)]
        vectors = [trainables.add_tokens(encoder, words, self.vectors).rows for encoder in models.text_encoders]
        views = self._views(concept)
        pools, run = views.pools(models, concept, generator), RUNS[self.run_stages]
        with cross_attention.record_cross_attention(models.unet) as maps:
            new = partial(self._stage, models, concept, generator, views, pools, maps)
            if "1" in run:
                yield new(
                    number=1,
                    params=vectors,
                    steps=self.steps_1,
                    batch_size=self.batch_size_1,
                    learning_rate=self.learning_rate_1,
                    mean_weight=self.mean_weight_1,
                    variance_weight=self.variance_weight_1,
                )
            if "2" in run:
                yield new(
                    number=2,
                    classes=classes,
                    params=self._weights(models, ".attn2.", CROSS_ATTENTION, generator),
                    steps=self.steps_2,
                    batch_size=self.batch_size_2,
                    learning_rate=self.learning_rate_2,
                    mean_weight=self.mean_weight_2,
                    variance_weight=self.variance_weight_2,
                )
            if "3" in run:
                yield new(
                    number=3,
                    classes=classes,
                    params=self._weights(models, "", CROSS_ATTENTION + OTHER_LAYERS, generator),
                    steps=self.steps_3,
                    batch_size=self.batch_size_3,
                    learning_rate=self.learning_rate_3,
                    mean_weight=self.mean_weight_3,
                    variance_weight=self.variance_weight_3,
                )

    def _views(self, concept: Concept) -> PairedViews:
        """Return random rotations and flips, which the prompt does not name; every stage sets its batch size."""
        augment = partial(
            augmentation.random_rotation, p=self.rotation_p, degrees=self.rotation_degrees, flip_p=self.flip_p
        )
        return PairedViews(
            templates=(PROMPT,),
            subjects=concept.subjects(with_class_word=True),
            augment=augment,
            pool=self.views,
            batch_size=0,
            crop="random",
        )

    def _weights(self, models: Models, pattern: str, targets: list[str], generator: Generator) -> list[Parameter]:
        """Return the U-Net's weights whose names contain `pattern`, or LoRA on its layers `targets`."""
        if self.fine_tuning == "full":
            return trainables.select(models, pattern)
        return trainables.add_lora(models.unet, targets, self.lora_rank, self.lora_rank, generator)

    def _stage(
        self,
        models: Models,
        concept: Concept,
        generator: Generator,
        views: PairedViews,
        pools: Iterator[Latents],
        maps: AttentionMaps,
        *,
        number: int,
        params: list[Parameter],
        steps: int,
        batch_size: int,
        learning_rate: float,
        mean_weight: float,
        variance_weight: float,
        classes: ClassImages | None = None,
    ) -> Stage:
        """Return a stage; a term of the regularizer whose weight is 0 is not computed."""
        whole = batch_size * (2 if classes else 1)
        regularizer = self._regularizer(models, concept, maps, whole)
        terms = {
            "prior_preservation": (self.prior_weight if classes else 0.0, losses.prior_preservation),
            "attention_means": (mean_weight, regularizer(statistic="means")),
            "attention_variances": (variance_weight, regularizer(statistic="variances")),
        }
        return Stage(
            name=f"attndreambooth {number}",
            number=number,
            steps=steps,
            batch_size=whole,
            params=[{"params": params, "lr": learning_rate, "max_grad_norm": self.max_grad_norm}],
            optimization=part(Optimization, self),
            noise=part(Noise, self),
            batches=replace(views, batch_size=batch_size).batches(models, concept, pools, generator, classes=classes),
            first=partial(views.first, models, concept, generator),
            templates=views.templates,
            losses={"denoising": (1.0, losses.denoising)} | {name: term for name, term in terms.items() if term[0]},
            timesteps=timesteps.uniform(models.alphas_cumprod, generator),
            after_pass=maps.clear,
        )

    def _regularizer(self, models: Models, concept: Concept, maps: AttentionMaps, batch_size: int) -> Callable:
        """Return `AttentionRegularization` of V and C in these models, without its statistic."""
        tokenizer = models.text_encoders[-1].tokenizer
        class_word = tokenizer.encode_words(concept.class_word)[CLASS_TOKENS[self.class_tokens]]
        return partial(
            losses.AttentionRegularization,
            maps=maps,
            placeholder=tuple(tokenizer.placeholders[concept.placeholder_token]),
            class_word=tuple(class_word),
            batch_size=batch_size,
        )


PAPER = AttnDreamBooth()
FAST = replace(PAPER, steps_3=200, batch_size_3=4, learning_rate_3=1e-5)
PRESETS = {"paper": PAPER, "fast": FAST}
