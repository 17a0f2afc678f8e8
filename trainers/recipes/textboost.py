"""TextBoost: personalise the text encoder from one picture; the U-Net stays as it is, unless it gets a LoRA, too.

Paper: "TextBoost: Towards One-Shot Personalization of Text-to-Image Models via Fine-tuning Text Encoder",
arXiv 2409.08248. Authors' settings: 250 steps of 8 pictures at 512 px on SD 1.5 / 2.1; presets "benchmark" (their 30
subjects), "readme" (their example command) and "style" (150 steps of 4 pictures, each with a caption).
Ours differs where the released code departs from the paper by accident: timesteps are really weighted by their
signal-to-noise ratio, every augmentation token is really learned, only new token rows move, and the fixed outputs
come from the model at hand. Views are encoded ahead, so that no autoencoder and no teacher runs inside a step.
"""

from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from functools import partial

from torch import Generator
from torch.nn import Module, Parameter

from ..data import augmentation
from ..data.concept import Concept
from ..data.context import Context
from ..data.paired_views import PairedViews
from ..data.preservation import PreservationPrompts, shipped_captions
from ..data.templates import TEMPLATES
from ..models.diffusion import Models
from ..settings import setting
from ..training import losses, timesteps, trainables
from ..training.stage import Stage

TEXT_TARGETS = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"]
UNET_TARGETS = ["attn2.to_k", "attn2.to_v"]
# Of several text encoders; a model with one has the same whatever is chosen.
WHICH = {"second": slice(-1, None), "first": slice(0, 1), "both": slice(None)}
# Which rows of a LoRA's B train, counted from 0 along its outputs: an object's are odd, a style's even, so that the
# two never change the same output.
MIXING = {"off": slice(None), "object": slice(1, None, 2), "style": slice(0, None, 2)}


@dataclass(frozen=True, kw_only=True)
class TextBoost:
    """Hyperparameters of TextBoost; the defaults are the authors' benchmark settings."""

    steps: int = setting(
        250, "Optimizer steps; the paper uses 250 for objects, its 2026 revision 100.", min=1, max=100_000
    )
    batch_size: int = setting(8, "Batch size: images per optimizer step.", min=1, max=512)
    lora_learning_rate: float = setting(1e-4, "Learning rate of the text encoder's LoRA.", min=0.0, max=1.0)
    embedding_learning_rate: float = setting(1e-3, "Learning rate of the learned token embeddings.", min=0.0, max=1.0)
    templates: str = setting(
        "imagenet_small",
        "Prompt templates for training: imagenet_small has 27 photo templates, plain has 5 simple ones.",
        options=("imagenet_small", "plain"),
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
        "How prompts name the augmentation of an image: with learned tokens, in plain words, or not at all.",
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
    weight_decay: float = setting(1e-2, "Weight decay of AdamW.", min=0.0, max=1.0, advanced=True)

    captions: tuple[str, ...] = setting(
        (),
        "Text file in the input folder with captions for knowledge preservation, one per line; empty: the pack's own.",
        advanced=True,
    )
    augmentations: str = setting(
        "all",
        "Augmentations besides grayscale: scale, crop, shift, horizontal flip and collage (all), or the flip alone.",
        options=tuple(augmentation.GEOMETRY),
        advanced=True,
    )
    mixing: str = setting(
        "off",
        "Train only the odd rows of the LoRA (object) or the even ones (style), so that one of each can be merged.",
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

    def subject(self, concept: Concept) -> str:
        """What `{}` in a prompt stands for."""
        return concept.subject(self.with_class_word)

    def check(self, concept: Concept, known: Collection[str] = ()) -> None:
        """Raise `ValueError` where these settings cannot learn this concept."""
        paired_views(self, concept).check(concept)

    def stages(self, models: Models, concept: Concept, generator: Generator, context: Context) -> Iterator[Stage]:
        if self.fixed_outputs:
            for encoder in models.text_encoders:
                encoder.fix_special_outputs()
        views = paired_views(self, concept)
        words = [(concept.placeholder_token, concept.initializer), *views.tokens]
        tokens = [trainables.add_tokens(encoder, words) for encoder in models.text_encoders][WHICH[self.text_encoder]]
        preserved = self._preserved(models, concept)  # while the encoder still is the teacher
        pools = views.pools(models, concept, generator)
        lora = self._lora(models, generator)

        objectives = {"denoising": (1.0, losses.denoising)}
        if preserved:
            preservation = partial(losses.knowledge_preservation, encoders=WHICH[self.text_encoder])
            objectives["knowledge_preservation"] = (self.knowledge_weight, preservation)
        sampler = timesteps.snr_weighted if self.snr_weighted else timesteps.uniform
        yield Stage(
            name="textboost",
            steps=self.steps,
            batch_size=self.batch_size,
            params=[{"params": [t.rows for t in tokens], "lr": self.embedding_learning_rate}, *lora],
            weight_decay=self.weight_decay,
            batches=views.batches(models, concept, pools, generator, preserved),
            losses=objectives,
            timesteps=sampler(models.alphas_cumprod, generator),
            after_step=trainables.norm_clamp(tokens) if self.clamp_norms else lambda: None,
        )

    def _lora(self, models: Models, generator: Generator) -> list[dict]:
        """Optimizer groups: the text encoders' LoRA and, where it is on, the U-Net's, whose alpha is its rank."""

        def layers(module: Module, targets: list[str], rank: int, alpha: float) -> list[Parameter]:
            return trainables.add_lora(module, targets, rank, alpha, generator, MIXING[self.mixing])

        def group(params: list[Parameter], lr: float) -> dict:
            return {"params": params, "lr": lr, "max_grad_norm": self.max_grad_norm}

        text = []
        for encoder in models.text_encoders[WHICH[self.text_encoder]]:
            targets = [f"{layer}.{target}" for layer in encoder.layers_read for target in TEXT_TARGETS]
            text += layers(encoder.text_model, targets, self.lora_rank, self.lora_alpha)
        groups = [group(text, self.lora_learning_rate)]
        if rank := self.unet_lora_rank:
            groups.append(group(layers(models.unet, UNET_TARGETS, rank, rank), self.unet_lora_learning_rate))
        return groups

    def _preserved(self, models: Models, concept: Concept) -> PreservationPrompts | None:
        if not self.knowledge_weight:
            return None
        captions = self.captions or shipped_captions()
        return PreservationPrompts(models, concept.class_word, TEMPLATES[self.templates], captions)


def paired_views(recipe: "TextBoost", concept: Concept) -> PairedViews:
    """The paper's augmentation, which changes image and prompt together; the revision has the same fields."""
    probabilities = {"p": recipe.augmentation_p, "grayscale_p": recipe.grayscale_p, "kinds": recipe.augmentations}
    learned = augmentation.NAMES[recipe.augmentations] if recipe.augmentation_prompt == "tokens" else ()
    return PairedViews(
        templates=TEMPLATES[recipe.templates],
        subject=recipe.subject(concept),
        augment=partial(augmentation.augment, **probabilities),
        pool=recipe.views,
        batch_size=recipe.batch_size,
        naming=recipe.augmentation_prompt,
        tokens=tuple(augmentation.TOKENS[name] for name in learned),
    )


BENCHMARK = TextBoost()
README = replace(BENCHMARK, lora_learning_rate=5e-5, templates="plain", with_class_word=True, augmentation_p=0.8)
# Where a picture has no caption, "a photo of" would contradict a painting: the plain templates.
STYLE = replace(BENCHMARK, steps=150, batch_size=4, templates="plain", augmentations="flip")
PRESETS = {"benchmark": BENCHMARK, "readme": README, "style": STYLE}
