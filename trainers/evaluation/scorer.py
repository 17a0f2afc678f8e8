"""Scores of images by metric models: one after the other, each on the device only while it computes.

Images and texts in, a Report out; the caller generates the images.
"""

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch
from PIL import Image
from torch import Tensor

from ..metrics import metrics
from ..metrics.clip import ClipConfig, ExtractorConfig
from ..metrics.dino import DinoConfig
from ..metrics.extractor_cache import ExtractorCache
from ..metrics.feature_extractors import FeatureExtractor, lacking
from ..metrics.lpips import LPIPS_NAME, LpipsConfig
from ..settings import part, same, setting
from .report import CLIP_T, DIVERSITY, Report, Scored

LPIPS, ENCODER, OFF = "LPIPS", "DINO encoder", "off"
GRAY = (128, 128, 128)
# Setting `reference_scores` -> how CLIP-I and DINO compare with several references: `metrics.clip_image`. DreamBooth,
# TextBoost's first version and DVAR take the mean of all cosines, TextBoost's second one the best, none below 0.
FLOORED_MEAN = "floored mean"
REFERENCE_SCORES = {
    FLOORED_MEAN: {"floor": True, "best": False},
    "DreamBooth": {"floor": False, "best": False},
    "TextBoost 2024": {"floor": False, "best": False},
    "TextBoost 2026": {"floor": True, "best": True},
    "DVAR": {"floor": False, "best": False},
}


@dataclass(frozen=True, kw_only=True)
class ScorerConfig:
    """Settings of the metric models."""

    clip_model: str = same(ClipConfig, "clip_model")
    clip_weights: str = same(ClipConfig, "clip_weights")
    clip_download: bool = same(ClipConfig, "clip_download")
    dino_model: str = same(DinoConfig, "dino_model")
    dino_weights: str = same(DinoConfig, "dino_weights")
    dino_download: bool = same(DinoConfig, "dino_download")
    diversity: str = setting(
        LPIPS,
        "How the diversity of a prompt's images is measured: by LPIPS, or by 1 - cosine similarity of the DINO "
        "encoder's features, another number that reports name so.",
        options=(LPIPS, ENCODER, OFF),
    )
    lpips_weights: str = same(LpipsConfig, "lpips_weights")
    reference_scores: str = setting(
        FLOORED_MEAN,
        "How CLIP-I and DINO compare with several references: the mean cosine with negative ones as 0 (floored mean), "
        "or as a paper's authors do: the plain mean (DreamBooth, TextBoost 2024, DVAR) or the best (TextBoost 2026).",
        options=tuple(REFERENCE_SCORES),
    )

    @property
    def clip(self) -> ClipConfig:
        """Settings of CLIP-T's and CLIP-I's model."""
        return part(ClipConfig, self)

    @property
    def dino(self) -> DinoConfig:
        """Settings of DINO's model."""
        return part(DinoConfig, self)

    @property
    def lpips(self) -> LpipsConfig:
        """Settings of LPIPS."""
        return LpipsConfig(lpips_weights=self.lpips_weights)

    def choices(self, extractors: ExtractorCache) -> list[ExtractorConfig]:
        """Return the metric models that will be used; LPIPS only where it can be measured."""
        with_lpips = self.diversity == LPIPS and not self.lpips.missing(extractors.folders())
        return [self.clip, self.dino, *([self.lpips] if with_lpips else [])]

    def check(self, extractors: ExtractorCache) -> None:
        """Raise `ValueError` where some cannot be loaded, as far as names and folders show; quick."""
        extractors.check(*self.choices(extractors))


@dataclass(frozen=True, kw_only=True)
class GeneratedImage:
    """A generated image, its prompt and the text that CLIP-T compares it with."""

    prompt: str
    text: str
    seed: int
    image: Image.Image
    mask: Tensor | None = None  # [h, w] where the subject is, for CLIP-I and DINO


@dataclass(frozen=True, kw_only=True)
class References:
    """Images of the subject: those of the training, and others."""

    seen: Sequence[Image.Image] = ()
    unseen: Sequence[Image.Image] = ()

    def named(self) -> dict[str, Sequence[Image.Image]]:
        """Return both kinds by name."""
        return {"seen": self.seen, "unseen": self.unseen}


@dataclass(kw_only=True)
class Scorer:
    """Scores images with the metric models of a config, on a device.

    Args:
        on_extractor: called with the name of the metric model that comes next; may raise to interrupt.
        on_images: called with the number of images scored since the last call; may raise to interrupt.
        make_room: called with a metric model's bytes before it moves to the device.
    """

    scorer_config: ScorerConfig
    extractors: ExtractorCache
    device: torch.device | str = "cpu"
    on_extractor: Callable[[str], None] = lambda name: None
    on_images: Callable[[int], None] = lambda count: None
    make_room: Callable[[int], None] = lambda size: None
    _known: dict[ExtractorConfig, dict] = field(default_factory=dict, init=False)  # of the report in progress

    def report(self, label: str, generated: Sequence[GeneratedImage], references: References) -> Report:
        """Return every image's scores, and each prompt's diversity.

        Raises:
            ValueError: there is no image, or a metric model cannot be loaded.
        """
        if not generated:
            raise ValueError("There is no image to score: connect some.")
        self._load()
        self._known.clear()
        start = time.perf_counter()
        columns, names = self._similarities(generated, references)
        distances, missing = self._diversity(generated, names)
        for kind, given in references.named().items():
            if not given:
                missing |= {f"{score} {kind}": f"no {kind} references" for score in ("CLIP-I", "DINO")}
        return Report(
            label=label,
            images=_scored(generated, columns),
            diversity=distances,
            missing=missing,
            metric_models={column: name for column, name in names.items() if column not in missing},
            references={kind: tuple(images) for kind, images in references.named().items() if images},
            scoring_seconds=(time.perf_counter() - start) / len(generated),
        )

    def _load(self) -> None:
        for choice in self.scorer_config.choices(self.extractors):
            self.on_extractor(f"reading {described(choice)}")
            self.extractors.load(choice)

    @contextlib.contextmanager
    def _extractor(self, choice: ExtractorConfig) -> Iterator[FeatureExtractor]:
        """Yield a metric model on the device that encodes no image twice."""
        self.on_extractor(f"scoring with {described(choice)}")
        self.make_room(_bytes(self.extractors.load(choice)))
        with self.extractors.on(self.device, choice) as extractor:
            known = self._known.setdefault(choice, {})
            encodes = extractor.image_features is not lacking
            yield remembering(extractor, known, self.on_images) if encodes else extractor

    def _similarities(self, generated, references) -> tuple[dict[str, Tensor], dict[str, str]]:
        """Return CLIP-T, CLIP-I and DINO as column -> `[images]`, and column -> metric model."""
        images, texts = [each.image for each in generated], [each.text for each in generated]
        compared = REFERENCE_SCORES[self.scorer_config.reference_scores]
        subjects = [each.image if each.mask is None else foreground(each.image, each.mask) for each in generated]
        with self._extractor(self.scorer_config.clip) as clip:
            columns = {CLIP_T: metrics.clip_text(clip, images, texts)}
            for kind, others in references.named().items():
                columns |= {f"CLIP-I {kind}": metrics.clip_image(clip, subjects, others, **compared)} if others else {}
        names = dict.fromkeys(columns, described(self.scorer_config.clip))
        with self._extractor(self.scorer_config.dino) as encoder:
            for kind, others in references.named().items():
                columns |= {f"DINO {kind}": metrics.dino(encoder, subjects, others, **compared)} if others else {}
        names = dict.fromkeys(columns, described(self.scorer_config.dino)) | names
        if (protocol := self.scorer_config.reference_scores) != FLOORED_MEAN:
            names |= {column: f"{name}, compared as {protocol}" for column, name in names.items() if column != CLIP_T}
        return columns, names

    def _diversity(self, generated, names: dict[str, str]) -> tuple[dict[str, float], dict[str, str]]:
        """Return prompt -> distance, and the reason where there is none; add the metric model to `names`."""
        if why := self._no_diversity(generated):
            return {}, {DIVERSITY: why}
        by_lpips = self.scorer_config.diversity == LPIPS
        found: dict[str, float] = {}
        with self._extractor(self.scorer_config.lpips if by_lpips else self.scorer_config.dino) as extractor:
            measure = extractor if by_lpips else metrics.feature_distances(extractor)
            for prompt, images in _by_prompt(generated).items():
                if (distance := metrics.diversity(measure, images)) is not None:
                    found[prompt] = distance
                self.on_images(len(images) * by_lpips)
        names[DIVERSITY] = LPIPS_NAME if by_lpips else f"1 - cosine of {described(self.scorer_config.dino)}"
        return found, {}

    def _no_diversity(self, generated) -> str:
        """Say why diversity cannot be measured; "" if it can."""
        groups = _by_prompt(generated).values()
        if self.scorer_config.diversity == OFF:
            return "switched off"
        if all(len(images) < 2 for images in groups):
            return "no prompt has two images"
        if self.scorer_config.diversity == LPIPS and any(
            len({image.size for image in images}) > 1 for images in groups
        ):
            return "images of one prompt differ in size"
        return (
            self.scorer_config.lpips.missing(self.extractors.folders()) if self.scorer_config.diversity == LPIPS else ""
        )


def described(choice: ExtractorConfig) -> str:
    """Return a metric model's name for users."""
    kinds: dict[type, str] = {ClipConfig: "clip", DinoConfig: "dino"}
    kind = kinds.get(type(choice))
    if kind is None:
        return LPIPS_NAME
    model, weights = (getattr(choice, f"{kind}_{part}").strip() for part in ("model", "weights"))
    return f"{kind.upper()} {model}" + (f" from {weights}" if weights else "")


def remembering(
    extractor: FeatureExtractor,
    known: dict[int, tuple[object, Tensor]],
    on_images: Callable[[int], None] = lambda count: None,
) -> FeatureExtractor:
    """Return the extractor with a memory that encodes each image object once: CLIP-T and CLIP-I share features.

    Args:
        known: features by `id` of the image; it references the images, so that no id is used again.
    """

    def image_features(images: Sequence) -> Tensor:
        new = [*{id(image): image for image in images if id(image) not in known}.values()]
        if new:
            known.update((id(image), (image, row)) for image, row in zip(new, extractor.image_features(new).cpu()))
            on_images(len(new))
        return torch.stack([known[id(image)][1] for image in images])

    return replace(extractor, image_features=image_features)


def foreground(image: Image.Image, mask: Tensor) -> Image.Image:
    """Return the image where `mask` `[h, w]`, 0..1, of any size, is 1; mid-gray around it."""
    shape = Image.fromarray((mask.clamp(0, 1) * 255).round().byte().cpu().numpy())
    shape = shape.resize(image.size, Image.Resampling.BILINEAR)
    return Image.composite(image.convert("RGB"), Image.new("RGB", image.size, GRAY), shape)


def _by_prompt(generated: Sequence[GeneratedImage]) -> dict[str, list[Image.Image]]:
    return {each.prompt: [other.image for other in generated if other.prompt == each.prompt] for each in generated}


def _scored(generated: Sequence[GeneratedImage], columns: dict[str, Tensor]) -> tuple[Scored, ...]:
    rows = [{name: float(values[i]) for name, values in columns.items()} for i in range(len(generated))]
    return tuple(
        Scored(prompt=each.prompt, text=each.text, seed=each.seed, image=each.image, scores=scores)
        for each, scores in zip(generated, rows, strict=True)
    )


def _bytes(extractor: FeatureExtractor) -> int:
    return sum(weight.numel() * weight.element_size() for weight in extractor.module.parameters())
