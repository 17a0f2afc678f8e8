"""CLIP early stopping: stop when generated images no longer become more similar to the references.

The baseline of the DVAR paper (arXiv 2302.04841), with its settings: every 50 steps 8 images are generated, and the
score is the mean CLIP similarity of image i to reference i (references in turn). An improvement is a score above the
best so far by more than eps; more than `patience` evaluations in a row without one stop the stage. The best score
moves with improvements only, so slow progress adds up. An evaluation costs `images * sampler_steps` passes through the
U-Net, twice for the guidance.

As in the authors' code, the prompts are drawn from the method's templates with the placeholder token alone, without
the class word and an augmentation's name, also where training prompts have these.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..digest import choose
from ..images import to_pil
from ..metrics.clip import ClipConfig
from ..metrics.metrics import unit_features
from ..models import sampler
from ..settings import part, same, setting
from ..training.stage import Stage
from .monitor import KEEP, Evaluator, FixedSteps, Measurement, StageContext


@dataclass(frozen=True, kw_only=True)
class ClipEarlyStopping:
    """Settings of CLIP early stopping; the defaults are the authors' for Textual Inversion."""

    patience: int = setting(
        6, "Stop after more than this many evaluations in a row without an improvement.", min=0, max=1000
    )
    min_delta: float = setting(
        0.02, "Smallest gain over the best score that counts as an improvement.", min=0.0, max=1.0
    )
    every: int = setting(50, "Steps between evaluations.", min=1, max=100_000)
    images: int = setting(
        8, "Images generated per evaluation, each compared with one reference image in turn.", min=1, max=64
    )
    guidance: float = setting(7.5, "Guidance scale (CFG) of these images.", min=1.0, max=30.0)
    sampler_steps: int = setting(
        50, "Sampler steps of these images, which are most of an evaluation's cost.", min=1, max=1000
    )
    stage: str = same(FixedSteps, "stage", "all")
    min_steps: int = setting(0, "Never stop a stage before this step.", min=0, max=100_000)
    max_steps: int = setting(
        0, "Always stop a stage at this step; 0 leaves its length to the recipe.", min=0, max=100_000
    )
    stop_training: bool = same(FixedSteps, "stop_training")
    keep: str = setting("last", "Return the last state, or the one with the highest score (best).", options=KEEP)
    seed: int = setting(37, "Seed of these images and their prompts.", min=0, max=2**63 - 1, advanced=True)
    clip_model: str = same(ClipConfig, "clip_model")
    clip_weights: str = same(ClipConfig, "clip_weights")
    clip_download: bool = same(ClipConfig, "clip_download")

    name = "CLIP Early Stopping"

    @property
    def clip(self) -> ClipConfig:
        """Settings of the CLIP that scores."""
        return part(ClipConfig, self)

    @property
    def extractor_configs(self) -> tuple[ClipConfig, ...]:
        """Configs of the feature extractors that must be loaded before the stages."""
        return (self.clip,)

    def evaluator(self, stage_context: StageContext) -> Evaluator:
        """Return the function that evaluates this stage."""
        score = ImageScore(self, stage_context)

        def measure(step: int, past: list[Measurement]) -> Measurement | None:
            if step == 0 or step % self.every:
                return None
            scores = [*(earlier["score"] for earlier in past), score()]
            best, idle = progress(scores, self.min_delta)
            return {"score": scores[-1], "best": best, "threshold": best + self.min_delta, "idle": float(idle)}

        return measure

    def reason(self, measure: Measurement) -> str:
        """Say why to stop after this evaluation; "" to continue."""
        if measure["idle"] <= self.patience:
            return ""
        return (
            f"no score above {measure['threshold']:.3f} in {measure['idle']:.0f} evaluations, the best is "
            f"{measure['best']:.3f}"
        )

    def quality(self, measure: Measurement) -> float:
        """Return the score: more is better."""
        return measure["score"]

    def warning(self, stage: Stage) -> str:
        """Say what to change where it can never stop this stage; "" where it can."""
        steps = min(stage.steps, self.max_steps or stage.steps)
        first = self.every * (
            self.patience + 2
        )  # the first evaluation sets the score that the others are compared with
        if first < steps:
            return ""
        return (
            f"CLIP Early Stopping stops at step {first} at the earliest, too late for the {steps} steps of "
            f"{stage.name}: choose a preset for short runs, or lower every or patience."
        )


def progress(scores: Sequence[float], min_delta: float) -> tuple[float, int]:
    """Return the best score after these evaluations, and how many of the last ones in a row have not beaten it."""
    best, idle = scores[0], 0
    for score in scores[1:]:
        best, idle = (score, 0) if score > best + min_delta else (best, idle + 1)
    return best, idle


def fired_at(scores: Sequence[float], patience: int, min_delta: float) -> int | None:
    """Return the evaluation, counted from 1, at which these scores stop a stage; `None` where they do not."""
    numbers = range(1, len(scores) + 1)
    return next((n for n in numbers if progress(scores[:n], min_delta)[1] > patience), None)


class ImageScore:
    """CLIP similarity of generated images to the references, with the same prompts and noise at each evaluation."""

    def __init__(self, settings: ClipEarlyStopping, stage_context: StageContext):
        self.settings, self.models, self.device = settings, stage_context.models, stage_context.device
        self.extractors = stage_context.context.extractors
        concept, generator = stage_context.concept, torch.Generator().manual_seed(settings.seed)
        templates = [choose(stage_context.stage.templates, generator) for _ in range(settings.images)]
        self.prompts = [template.replace("{}", concept.placeholder_token) for template in templates]
        self.input_ids = self.models.tokenize(self.prompts)
        self.size, images = concept.sizes(self.models.resolution)[0], concept.images
        with self.extractors.on(self.device.device, settings.clip) as clip:
            references = unit_features(clip.image_features, [to_pil(image) for image in images])
        self.references = references[torch.arange(settings.images) % len(images)]

    def __call__(self) -> float:
        """Generate images, and return the mean cosine of image i to reference i, references in turn."""
        images = [to_pil(image) for image in self.generate()]
        with self.extractors.on(self.device.device, self.settings.clip) as clip:
            found = unit_features(clip.image_features, images)
        return float((found * self.references).sum(dim=1).mean())

    def generate(self) -> Tensor:
        """Generate images `[images, 3, h, w]` in 0..1."""
        settings = self.settings
        seeds = [(settings.seed + i) % 2**63 for i in range(settings.images)]
        options: dict = {"size": self.size, "steps": settings.sampler_steps, "guidance": settings.guidance}
        with self.device.autocast():
            return sampler.sample_as_fits(self.models, self.input_ids, seeds, **options)


TEXTUAL_INVERSION = ClipEarlyStopping()
# The last two are ours: with the authors' settings the first possible stop, step 400, comes after these methods' end.
PRESETS = {
    "Textual Inversion": TEXTUAL_INVERSION,
    "Custom Diffusion": replace(TEXTUAL_INVERSION, guidance=6.0),
    "DreamBooth-LoRA": replace(TEXTUAL_INVERSION, patience=3, min_delta=0.04, guidance=6.0, sampler_steps=200),
    "TextBoost": replace(TEXTUAL_INVERSION, patience=3, min_delta=0.01, every=25, images=4, sampler_steps=25),
    "AttnDreamBooth": replace(
        TEXTUAL_INVERSION, patience=3, min_delta=0.01, every=20, images=4, sampler_steps=25, stage="3"
    ),
}
