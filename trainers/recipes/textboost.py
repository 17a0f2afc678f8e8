"""TextBoost: personalise the text encoder from one image; the U-Net stays frozen, unless it gets a LoRA, too.

Paper: "TextBoost: Towards One-Shot Personalization of Text-to-Image Models via Fine-tuning Text Encoder",
arXiv 2409.08248. V's vectors and a LoRA on queries, keys and values of the text encoder train; with y an image under
an augmentation that its prompt names, t drawn with `p(t) ~ max(log SNR) - log SNR(t)`,

    L = |epsilon - epsilon_theta(y_t, t, h(prompt))|^2 + 0.1 * mean(1 - cos(h(q), h_frozen(q)))

over prompts q: captions, but a tenth templates with the class word and, by `null_prob`, a tenth empty. After each step
new vectors are scaled back to the vocabulary's mean length. Presets: "benchmark" (the authors' 30 subjects: 250 steps
of 8 images, 512 px, SD 1.5 or 2.1), "readme" (their example command) and "style" (150 steps of 4 images, each with a
caption; the rows of a style, so that it merges with an object's).

Differences to the authors' code:
- Where it departs from the paper by accident, the paper is followed: timesteps are weighted by their signal-to-noise
  ratio, every augmentation token is learned, only new token rows move, and the fixed outputs (start token, empty
  prompt) come from the model at hand.
- Views are encoded before training: a pool of 512, not a fresh one for every step.
- Without learned tokens theirs never flips. Here `augmentations = flip` still does; among `all` neither flips.
"""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial

from torch import Generator
from torch.nn import Module, Parameter

from ..data import augmentation
from ..data.augmentation import Operation
from ..data.class_images import PriorPreservation
from ..data.concept import Concept
from ..data.context import Context
from ..data.paired_views import PairedViews
from ..data.preservation import PreservationPrompts, PromptMix, shipped_captions
from ..data.templates import TEMPLATES
from ..models.diffusion import Models
from ..settings import part, same, setting
from ..training import losses, optimizers, timesteps, trainables
from ..training.objective import Loss
from ..training.optimizers import Optimization
from ..training.stage import Stage
from ..training.step_inputs import Noise

TEXT_TARGETS = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"]
UNET_TARGETS = ["attn2.to_k", "attn2.to_v"]
LORA_INIT = trainables.gaussian  # A ~ normal(0, 1 / rank), B = 0
CLASS_PROMPTS = 0.1  # share of templates with the class word among the prompts whose encoding is preserved

# Setting `augmentations` -> geometric operations: with probability `augmentation_p` one of them is applied, all equally
# likely. A style lies in strokes and proportions: it survives a horizontal flip, not a zoom.
OPERATIONS = {
    "all": (
        partial(augmentation.scale, factors=(0.34, 1.4), named_outside=(0.6, 1.2)),
        partial(augmentation.crop, areas=(0.08, 1.0)),
        partial(augmentation.shift, shares=(0.15, 0.30)),
        augmentation.flip,
    ),
    "flip": (augmentation.flip,),
}
# Settings that add a geometric operation, and those that add one of colours; off as in the authors' code.
FURTHER = {"vertical_flip": augmentation.vertical_flip, "quarter_turn": augmentation.quarter_turn}
COLOURS = {"brightness": augmentation.brightness, "jpeg": augmentation.jpeg}
# What names them; they have no tokens in the authors' code.
FURTHER_PHRASES: dict[str, tuple[str, ...]] = {
    "vflip": ("vertically flipped",),
    "rot90": ("90 degrees counter clockwise rotated",),
    "rot270": ("90 degrees clockwise rotated",),
    "dimmed": ("dimmed",),
    "bright": ("bright",),
    "jpeg": ("JPEG",),
}
# Tiles on a side of a collage, made with probability `augmentation_p`. Grayscale comes last, with `grayscale_p`.
COLLAGES = {"all": (2, 3), "flip": ()}
# Operation -> learned token and the words it starts from. "ktn", "pll" and "ucd" are rare strings without a meaning.
TOKENS = {
    "grayscale": ("<grayscale>", "grayscale"),
    "zoom-in": ("<zoom-in>", "zoom in"),
    "zoom-out": ("<zoom-out>", "far away"),
    "collage": ("<collage>", "photo collage"),
    "crop": ("<crop>", "crop"),
    "hflip": ("<hflip>", "ktn"),
    "left": ("<left>", "pll"),
    "right": ("<right>", "ucd"),
}
# Names of the operations that a view may have, with a token each. The 2026 revision's weak ones have none.
NAMES = {"all": tuple(TOKENS), "flip": ("grayscale", "hflip"), "weak": ("grayscale",)}
# Setting `augmentation_prompt` -> what names an operation in a prompt; of several phrases one is drawn.
PHRASES: dict[str, Mapping[str, str | tuple[str, ...]]] = {
    "tokens": {**{name: token for name, (token, _) in TOKENS.items()}, **FURTHER_PHRASES},
    "words": {
        "grayscale": ("grayscale",),
        "zoom-in": ("zoomed in", "close up"),
        "zoom-out": ("a far away", "very small"),
        "collage": ("photo collage of",),
        "crop": ("cropped",),
        "hflip": ("horizontally flipped",),
        "left": ("on the left",),
        "right": ("on the right",),
    }
    | FURTHER_PHRASES,
    "none": {},
}
# Setting `text_encoder` of SDXL; a model with one text encoder trains it whatever is chosen.
WHICH = {"second": slice(-1, None), "first": slice(0, 1), "both": slice(None)}
# Setting `mixing` -> rows of B of the text encoder's LoRA that train, counted from 0 along its outputs, so that an
# object and a style never change the same output; as in the authors' code, whose files merge with these.
MIXING = {"off": slice(None), "object": slice(0, None, 2), "style": slice(1, None, 2)}


@dataclass(frozen=True, kw_only=True)
class TextBoost:
    """Settings of TextBoost; the defaults are the authors' for their benchmark."""

    steps: int = setting(
        250, "Optimizer steps; the paper uses 250 for objects, its 2026 revision 100.", min=1, max=100_000
    )
    batch_size: int = setting(8, "Batch size: images per optimizer step.", min=1, max=512)
    lora_learning_rate: float = setting(1e-4, "Learning rate of the text encoder's LoRA.", min=0.0, max=1.0)
    embedding_learning_rate: float = setting(1e-3, "Learning rate of the learned token embeddings.", min=0.0, max=1.0)
    templates: str = setting(
        "imagenet_small",
        "Prompt templates for training: imagenet_small has 27 photo templates, plain has 5 simple ones, style has 19 "
        "such as 'a painting in the style of {}'.",
        options=("imagenet_small", "plain", "style"),
    )
    with_class_word: bool = setting(False, "Train with the class word after the placeholder token: '<dog> dog'.")
    augmentation_p: float = setting(0.5, "Probability of a geometric augmentation, and of a collage.", min=0.0, max=1.0)
    lora_rank: int = setting(4, "Rank of the text encoder's LoRA.", min=1, max=256, advanced=True)
    lora_alpha: float = setting(
        4.0,
        "Alpha of the text encoder's LoRA: its updates are scaled by alpha / rank.",
        min=0.01,
        max=1024.0,
        advanced=True,
    )
    grayscale_p: float = setting(
        0.2, "Probability of converting an image to grayscale.", min=0.0, max=1.0, advanced=True
    )
    augmentation_prompt: str = setting(
        "tokens",
        "How prompts name the augmentation of an image: with learned tokens, in plain words, or not at all; without "
        "tokens there is no flip among the other augmentations.",
        options=("tokens", "words", "none"),
        advanced=True,
    )
    knowledge_weight: float = setting(
        0.1, "Weight of the knowledge-preservation loss, which keeps the meaning of other prompts.", min=0.0, max=100.0,
        advanced=True,
    )  # fmt: skip
    fixed_outputs: bool = setting(
        True,
        "Keep the encodings of the start token and of the empty prompt identical to the base model's.",
        advanced=True,
    )
    snr_weighted: bool = setting(
        True, "Sample timesteps by their signal-to-noise ratio, noisy ones more often, as in the paper.", advanced=True
    )
    clamp_norms: bool = setting(
        True, "Rescale learned token embeddings to the vocabulary's mean norm after each step.", advanced=True
    )
    views: int = setting(
        512, "Augmented images encoded to latents before training; 0 encodes new ones in every step.", min=0, max=65536,
        advanced=True,
    )  # fmt: skip
    max_grad_norm: float = setting(
        1.0,
        "Clip the gradient norm of the LoRA or the adapters to this value; 0 disables clipping.",
        min=0.0,
        max=1000.0,
        advanced=True,
    )
    weight_decay: float = same(Optimization, "weight_decay")

    captions: tuple[str, ...] = setting(
        (),
        "Text file in the input folder with captions for knowledge preservation, one per line; empty: the pack's own.",
        advanced=True,
    )
    augmentations: str = setting(
        "all",
        "Augmentations besides grayscale: scale, crop, shift, horizontal flip and collage (all), the flip alone, or a "
        "flip and a mild crop that no prompt names, as in the 2026 revision (weak).",
        options=tuple(NAMES),
        advanced=True,
    )
    mixing: str = setting(
        "off",
        "Train only rows 0, 2, 4 and so on of the text encoder's LoRA (object) or rows 1, 3, 5 (style), so that one of "
        "each can be merged.",
        options=tuple(MIXING),
        advanced=True,
    )
    unet_lora_rank: int = setting(
        0, "Rank of a LoRA on keys and values of the U-Net's cross-attention; 0 keeps the U-Net frozen.", min=0,
        max=256, advanced=True,
    )  # fmt: skip
    unet_lora_learning_rate: float = setting(
        1e-4, "Learning rate of the U-Net's LoRA.", min=0.0, max=1.0, advanced=True
    )
    text_encoder: str = setting(
        "second",
        "Which text encoder of SDXL is trained; the other encodes the placeholder token as its initializer.",
        options=tuple(WHICH),
        advanced=True,
    )
    vertical_flip: bool = setting(False, "Also flip images vertically, with augmentations all or flip.", advanced=True)
    quarter_turn: bool = setting(
        False, "Also rotate images by 90 degrees either way, with augmentations all or flip.", advanced=True
    )
    brightness: bool = setting(
        False, "Also dim or brighten images, in turn with grayscale, with augmentations all or flip.", advanced=True
    )
    jpeg: bool = setting(
        False, "Also compress images as JPEG, in turn with grayscale, with augmentations all or flip.", advanced=True
    )
    optimizer: str = same(Optimization, "optimizer")
    lr_scheduler: str = same(Optimization, "lr_scheduler")
    lr_warmup_steps: int = same(Optimization, "lr_warmup_steps")
    noise_offset: float = same(Noise, "noise_offset")
    null_prob: float = setting(
        0.1,
        "Share of the empty prompt among the prompts of the knowledge-preservation loss, as in the authors' code.",
        min=0.0,
        max=1.0,
        advanced=True,
    )
    prior_weight: float = same(PriorPreservation, "prior_weight")
    class_images: int = same(PriorPreservation, "class_images")
    class_image_steps: int = same(PriorPreservation, "class_image_steps")

    needs = "a text encoder that trains"

    def subject(self, concept: Concept) -> str:
        """Return what `{}` in a prompt stands for: `V`, or `V C` with the class word C."""
        return concept.subject(self.with_class_word)

    def check(self, concept: Concept, known: Collection[str] = ()) -> None:
        """Raise `ValueError` where these settings cannot learn this concept, or not on this machine."""
        optimizers.check(self.optimizer)
        paired_views(self, concept).check(concept)

    def stages(self, models: Models, concept: Concept, generator: Generator, context: Context) -> Iterator[Stage]:
        """Yield the only stage."""
        classes = part(PriorPreservation, self).images(models, concept, generator, context)
        if self.fixed_outputs:
            for encoder in models.text_encoders:
                encoder.fix_special_outputs()
        views = paired_views(self, concept)
        words = [*concept.words, *views.tokens]
        tokens = [trainables.add_tokens(encoder, words) for encoder in models.text_encoders][WHICH[self.text_encoder]]
        preserved = self._preserved(models, concept)  # while the encoder is the frozen one
        pools = views.pools(models, concept, generator)
        lora = self._lora(models, generator)

        objectives: dict[str, tuple[float, Loss]] = {"denoising": (1.0, losses.denoising)}
        if preserved:
            preservation = partial(losses.knowledge_preservation, encoders=WHICH[self.text_encoder])
            objectives["knowledge_preservation"] = (self.knowledge_weight, preservation)
        if classes:
            objectives["prior_preservation"] = (self.prior_weight, losses.prior_preservation)
        sampler = timesteps.snr_weighted if self.snr_weighted else timesteps.uniform
        yield Stage(
            name="textboost",
            steps=self.steps,
            batch_size=self.batch_size * (2 if classes else 1),
            params=[{"params": [t.rows for t in tokens], "lr": self.embedding_learning_rate}, *lora],
            optimization=part(Optimization, self),
            noise=part(Noise, self),
            batches=views.batches(models, concept, pools, generator, preserved, classes),
            first=partial(views.first, models, concept, generator),
            templates=TEMPLATES[self.templates],
            losses=objectives,
            timesteps=sampler(models.alphas_cumprod, generator),
            after_step=trainables.norm_clamp(tokens) if self.clamp_norms else lambda: None,
        )

    def _lora(self, models: Models, generator: Generator) -> list[dict]:
        """Optimizer groups: the text encoders' LoRA and, where it is on, the U-Net's, whose alpha is its rank."""

        def layers(module: Module, targets: list[str], rank: int, alpha: float, rows: slice) -> list[Parameter]:
            return trainables.add_lora(module, targets, rank, alpha, generator, rows, LORA_INIT)

        def group(params: list[Parameter], lr: float) -> dict:
            return {"params": params, "lr": lr, "max_grad_norm": self.max_grad_norm}

        text = []
        for encoder in models.text_encoders[WHICH[self.text_encoder]]:
            targets = [f"{layer}.{target}" for layer in encoder.layers_read for target in TEXT_TARGETS]
            text += layers(encoder.text_model, targets, self.lora_rank, self.lora_alpha, MIXING[self.mixing])
        groups = [group(text, self.lora_learning_rate)]
        if rank := self.unet_lora_rank:
            groups.append(
                group(layers(models.unet, UNET_TARGETS, rank, rank, slice(None)), self.unet_lora_learning_rate)
            )
        return groups

    def _preserved(self, models: Models, concept: Concept) -> PreservationPrompts | None:
        if not self.knowledge_weight:
            return None
        captions, mix = self.captions or shipped_captions(), PromptMix(empty=self.null_prob, class_word=CLASS_PROMPTS)
        classes = [*dict.fromkeys(member.class_word for member in concept.members)]
        return PreservationPrompts(models, classes, TEMPLATES[self.templates], captions, mix)


def paired_views(recipe: "TextBoost", concept: Concept) -> PairedViews:
    """Return the paper's augmentation of images with their prompts; TextBoost2026 has the same settings."""
    learned = NAMES[recipe.augmentations] if recipe.augmentation_prompt == "tokens" else ()
    if recipe.augmentations == "weak":
        augment = augmentation.weak
    else:
        operations = OPERATIONS[recipe.augmentations]
        if not learned and len(operations) > 1:  # as in the authors' code: no flip among others without its token
            operations = tuple(operation for operation in operations if operation is not augmentation.flip)
        augment = partial(
            augmentation.augment,
            operations=(*operations, *_chosen(recipe, FURTHER)),
            collages=COLLAGES[recipe.augmentations],
            colours=_chosen(recipe, COLOURS),
        )
    return PairedViews(
        templates=TEMPLATES[recipe.templates],
        subjects=concept.subjects(recipe.with_class_word),
        augment=partial(augment, p=recipe.augmentation_p, grayscale_p=recipe.grayscale_p),
        pool=recipe.views,
        batch_size=recipe.batch_size,
        phrases=PHRASES[recipe.augmentation_prompt],
        tokens=tuple(TOKENS[name] for name in learned),
        crop="random",
    )


def _chosen(recipe: "TextBoost", operations: Mapping[str, Operation]) -> tuple[Operation, ...]:
    """Return the operations whose setting is on."""
    return tuple(operation for name, operation in operations.items() if getattr(recipe, name))


BENCHMARK = TextBoost()
README = replace(BENCHMARK, lora_learning_rate=5e-5, templates="plain", with_class_word=True, augmentation_p=0.8)
STYLE = replace(
    BENCHMARK, steps=150, batch_size=4, templates="style", augmentations="flip", augmentation_p=0.8, mixing="style"
)
PRESETS = {"benchmark": BENCHMARK, "readme": README, "style": STYLE}
