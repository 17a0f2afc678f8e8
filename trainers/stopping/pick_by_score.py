"""Pick by score: return the state with the preferred balance of identity and text alignment.

Every so many steps the model generates images of a few prompts. Identity is their similarity to the references, text
alignment their similarity to the prompts. The balance is chosen afterwards: every scored state stays in the run's
folder, and another preference reads another file.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image

from ..data.prompts import SUBJECT, prompts_of
from ..images import to_pil
from ..metrics import metrics
from ..metrics.clip import ClipConfig
from ..metrics.dino import DinoConfig
from ..models import sampler
from ..settings import part, same, setting
from ..text import captions_of
from .monitor import Evaluator, FixedSteps, Measurement, NeverStops, StageContext

DINO, CLIP_I = "DINO", "CLIP-I"
PROMPTS = "a photo of a {} on the beach\na photo of a {} in the snow\na photo of a {} in the jungle\na painting of a {}"


@dataclass(frozen=True, kw_only=True)
class PickByScore(NeverStops):
    """Settings of Pick by Score."""

    text_weight: float = setting(
        0.5,
        "Your preference: 0 is identity alone, 1 is text alignment alone; another value picks another state of the "
        "same training.",
        min=0.0,
        max=1.0,
        slider=True,
        later=True,
    )
    every: int = setting(25, "Steps between evaluations; the last step is always evaluated.", min=1, max=100_000)
    prompts: str = setting(PROMPTS, "Prompts of the images to score, one per line; {} is the subject.", lines=True)
    seeds: int = setting(2, "Number of images per prompt.", min=1, max=64)
    guidance: float = setting(7.5, "Guidance scale (CFG) of these images.", min=1.0, max=30.0)
    sampler_steps: int = setting(
        20, "Sampler steps of these images, which are most of an evaluation's cost.", min=1, max=1000
    )
    identity: str = setting(
        DINO, "Metric model that measures identity, the similarity to the reference images.", options=(DINO, CLIP_I)
    )
    stage: str = same(FixedSteps, "stage", "all")
    # Not "seed": the editor would choose another one at each queue, and train again.
    first_seed: int = setting(
        0,
        "Seed of each prompt's first image; further images use the seeds that follow.",
        min=0,
        max=2**63 - 65,
        advanced=True,
    )
    clip_model: str = same(ClipConfig, "clip_model")
    clip_weights: str = same(ClipConfig, "clip_weights")
    clip_download: bool = same(ClipConfig, "clip_download")
    dino_model: str = same(DinoConfig, "dino_model")
    dino_weights: str = same(DinoConfig, "dino_weights")
    dino_download: bool = same(DinoConfig, "dino_download")

    name = "Pick by Score"
    keep = "all"
    stop_training = False
    min_steps = 0
    max_steps = 0

    def __post_init__(self):
        """Raise `ValueError` if no prompt has the subject in it."""
        if not any(SUBJECT in line for line in captions_of(self.prompts)):
            raise ValueError(
                "The prompts to score have no place for the subject: write {} in at least one, one prompt per line."
            )

    @property
    def extractor_configs(self) -> tuple[ClipConfig | DinoConfig, ...]:
        """Configs of the feature extractors: of text alignment, then of identity."""
        clip = part(ClipConfig, self)
        return clip, (part(DinoConfig, self) if self.identity == DINO else clip)

    def evaluator(self, stage_context: StageContext) -> Evaluator:
        """Return the function that scores this stage."""
        scores, last = Scores(self, stage_context), stage_context.stage.steps

        def measure(step: int, past: list[Measurement]) -> Measurement | None:
            if step == 0:
                return scores.floors()
            return None if step % self.every and step != last else scores()

        return measure


class Scores:
    """Identity and text alignment of generated images, with the same prompts and noise at each evaluation."""

    def __init__(self, settings: PickByScore, stage_context: StageContext):
        self.settings, self.models, self.device = settings, stage_context.models, stage_context.device
        self.extractors = stage_context.context.extractors
        self.references = [to_pil(image) for image in stage_context.concept.images]
        self.size = stage_context.concept.sizes(stage_context.models.resolution)[0]
        self.prompts, self.texts = (
            [line for line in prompts_of(settings.prompts, subject) for _ in range(settings.seeds)]
            for subject in (stage_context.subject, stage_context.concept.class_word)
        )

    def __call__(self) -> Measurement:
        """Return `identity` and `text`, means over the images."""
        images = self.generate(self.prompts)
        return {"identity": self.identity(images), "text": self.text(images, self.texts)}

    def floors(self) -> Measurement:
        """Return a lower bound of each score.

        `identity_floor`: of images of the class word, generated before training. `text_floor`: of the references
        themselves, which follow no prompt.
        """
        texts = [*dict.fromkeys(self.texts)]
        pairs = [(image, text) for image in self.references for text in texts]
        return {
            "identity_floor": self.identity(self.generate(self.texts)),
            "text_floor": self.text([image for image, _ in pairs], [text for _, text in pairs]),
        }

    def generate(self, prompts: Sequence[str]) -> list[Image.Image]:
        """Generate one image of each prompt."""
        count, first = self.settings.seeds, self.settings.first_seed
        seeds = [first + i % count for i in range(len(prompts))]
        options: dict = {"size": self.size, "steps": self.settings.sampler_steps, "guidance": self.settings.guidance}
        with self.device.autocast():
            images = sampler.sample_as_fits(self.models, self.models.tokenize([*prompts]), seeds, **options)
        return [to_pil(image) for image in images]

    def identity(self, images: Sequence[Image.Image]) -> float:
        """Return the mean similarity of images to the references."""
        score = metrics.dino if self.settings.identity == DINO else metrics.clip_image
        with self.extractors.on(self.device.device, self.settings.extractor_configs[1]) as extractor:
            return float(score(extractor, images, self.references).mean())

    def text(self, images: Sequence[Image.Image], texts: Sequence[str]) -> float:
        """Return the mean CLIP similarity of each image to its text."""
        with self.extractors.on(self.device.device, self.settings.extractor_configs[0]) as extractor:
            return float(metrics.clip_text(extractor, images, texts).mean())
