"""Scores of pictures by judges that a user named: one judge after the other, each on the device while it is asked.

Pictures and words in, a Report out; how the pictures came about is the caller's business.
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
from ..metrics.feature_extractors import FeatureExtractor
from ..metrics.lpips import LPIPS_NAME, LpipsConfig
from ..settings import part, same, setting
from .report import CLIP_T, DIVERSITY, Report, Scored

LPIPS, ENCODER, OFF = "LPIPS", "DINO encoder", "off"
GRAY = (128, 128, 128)


@dataclass(frozen=True, kw_only=True)
class ScorerConfig:
    """Which backbones score."""

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

    @property
    def clip(self) -> ClipConfig:
        return part(ClipConfig, self)

    @property
    def dino(self) -> DinoConfig:
        return part(DinoConfig, self)

    @property
    def lpips(self) -> LpipsConfig:
        return LpipsConfig(lpips_weights=self.lpips_weights)

    def choices(self, extractors: ExtractorCache) -> list[ExtractorConfig]:
        """Those that will be asked; LPIPS only where it can measure."""
        with_lpips = self.diversity == LPIPS and not self.lpips.missing(extractors.folders())
        return [self.clip, self.dino, *([self.lpips] if with_lpips else [])]

    def check(self, extractors: ExtractorCache) -> None:
        """Raise `ValueError` where one cannot be loaded, as far as names and folders tell; quick."""
        for choice in self.choices(extractors):
            extractors.check(choice)


@dataclass(frozen=True, kw_only=True)
class GeneratedImage:
    """A picture, what it was drawn from and what CLIP-T is to compare it with."""

    prompt: str
    text: str
    seed: int
    image: Image.Image
    mask: Tensor | None = None  # [h, w] where the subject is, for CLIP-I and DINO


@dataclass(frozen=True, kw_only=True)
class References:
    """The subject: pictures of the training, and others."""

    seen: Sequence[Image.Image] = ()
    unseen: Sequence[Image.Image] = ()

    def named(self) -> dict[str, Sequence[Image.Image]]:
        return {"seen": self.seen, "unseen": self.unseen}


@dataclass(kw_only=True)
class Scorer:
    """The judges of a report, and where they compute.

    Args:
        on_judge: told whom is asked next; may raise to break off.
        on_pictures: told how many pictures a judge has looked at since the last call; may raise to break off.
        make_room: told a judge's bytes before it moves to the device.
    """

    scorer_config: ScorerConfig
    extractors: ExtractorCache
    device: torch.device | str = "cpu"
    on_extractor: Callable[[str], None] = lambda name: None
    on_pictures: Callable[[int], None] = lambda count: None
    make_room: Callable[[int], None] = lambda size: None
    _known: dict[ExtractorConfig, dict] = field(default_factory=dict, init=False)  # of the report in progress

    def report(self, label: str, drawn: Sequence[GeneratedImage], references: References) -> Report:
        """Every picture's scores, and each prompt's diversity.

        Raises:
            ValueError: there is no picture, or a judge cannot be loaded.
        """
        if not drawn:
            raise ValueError("There is no picture to score: connect some.")
        self._load()
        self._known.clear()
        start = time.perf_counter()
        columns, names = self._likeness(drawn, references)
        distances, missing = self._diversity(drawn, names)
        for kind, pictures in references.named().items():
            if not pictures:
                missing |= {f"{score} {kind}": f"no {kind} references" for score in ("CLIP-I", "DINO")}
        return Report(
            label=label,
            pictures=_scored(drawn, columns),
            diversity=distances,
            missing=missing,
            metric_models={column: name for column, name in names.items() if column not in missing},
            references={kind: tuple(images) for kind, images in references.named().items() if images},
            scoring_seconds=(time.perf_counter() - start) / len(drawn),
        )

    def _load(self) -> None:
        for choice in self.scorer_config.choices(self.extractors):
            self.on_extractor(f"reading {described(choice)}")
            self.extractors.load(choice)

    @contextlib.contextmanager
    def _asked(self, choice: ExtractorConfig) -> Iterator[FeatureExtractor]:
        """A judge on the device, which looks at no picture twice."""
        self.on_extractor(f"scoring with {described(choice)}")
        self.make_room(_bytes(self.extractors.load(choice)))
        with self.extractors.on(self.device, choice) as extractor:
            known = self._known.setdefault(choice, {})
            yield remembering(extractor, known, self.on_pictures) if extractor.image_features else extractor

    def _likeness(self, drawn, references) -> tuple[dict[str, Tensor], dict[str, str]]:
        """CLIP-T, CLIP-I and DINO as column -> `[pictures]`, and column -> judge."""
        images, texts = [each.image for each in drawn], [each.text for each in drawn]
        subjects = [each.image if each.mask is None else foreground(each.image, each.mask) for each in drawn]
        with self._asked(self.scorer_config.clip) as clip:
            columns = {CLIP_T: metrics.clip_text(clip, images, texts)}
            for kind, others in references.named().items():
                columns |= {f"CLIP-I {kind}": metrics.clip_image(clip, subjects, others)} if others else {}
        names = dict.fromkeys(columns, described(self.scorer_config.clip))
        with self._asked(self.scorer_config.dino) as encoder:
            for kind, others in references.named().items():
                columns |= {f"DINO {kind}": metrics.dino(encoder, subjects, others)} if others else {}
        return columns, dict.fromkeys(columns, described(self.scorer_config.dino)) | names

    def _diversity(self, drawn, names: dict[str, str]) -> tuple[dict[str, float], dict[str, str]]:
        """Prompt -> distance, and why there is none; who measured it goes into `names`."""
        if why := self._no_diversity(drawn):
            return {}, {DIVERSITY: why}
        by_lpips = self.scorer_config.diversity == LPIPS
        found: dict[str, float] = {}
        with self._asked(self.scorer_config.lpips if by_lpips else self.scorer_config.dino) as extractor:
            measure = extractor if by_lpips else metrics.feature_distances(extractor)
            for prompt, images in _by_prompt(drawn).items():
                if len(images) > 1:
                    found[prompt] = metrics.diversity(measure, images)
                self.on_pictures(len(images) * by_lpips)
        names[DIVERSITY] = LPIPS_NAME if by_lpips else f"1 - cosine of {described(self.scorer_config.dino)}"
        return found, {}

    def _no_diversity(self, drawn) -> str:
        """Why it cannot be measured; "" if it can."""
        groups = _by_prompt(drawn).values()
        if self.scorer_config.diversity == OFF:
            return "switched off"
        if all(len(images) < 2 for images in groups):
            return "no prompt has two pictures"
        if self.scorer_config.diversity == LPIPS and any(
            len({image.size for image in images}) > 1 for images in groups
        ):
            return "pictures of one prompt differ in size"
        return (
            self.scorer_config.lpips.missing(self.extractors.folders()) if self.scorer_config.diversity == LPIPS else ""
        )


def described(choice: ExtractorConfig) -> str:
    """A judge by the names that the user gave."""
    kind = {ClipConfig: "clip", DinoConfig: "dino"}.get(type(choice))
    if kind is None:
        return LPIPS_NAME
    model, weights = (getattr(choice, f"{kind}_{part}").strip() for part in ("model", "weights"))
    return f"{kind.upper()} {model}" + (f" from {weights}" if weights else "")


def remembering(
    extractor: FeatureExtractor,
    known: dict[int, tuple[object, Tensor]],
    on_pictures: Callable[[int], None] = lambda count: None,
) -> FeatureExtractor:
    """The same judge, which encodes each picture (the very object) once: CLIP-T and CLIP-I read the same features.

    Args:
        known: what it has encoded, by the picture's identity; it keeps the pictures, so that none takes another's.
    """

    def image_features(images: Sequence) -> Tensor:
        new = [*{id(image): image for image in images if id(image) not in known}.values()]
        if new:
            known.update((id(image), (image, row)) for image, row in zip(new, extractor.image_features(new).cpu()))
            on_pictures(len(new))
        return torch.stack([known[id(image)][1] for image in images])

    return replace(extractor, image_features=image_features)


def foreground(image: Image.Image, mask: Tensor) -> Image.Image:
    """The picture where `mask` `[h, w]`, 0..1, of any size, is 1; mid-gray around it."""
    shape = Image.fromarray((mask.clamp(0, 1) * 255).round().byte().cpu().numpy())
    shape = shape.resize(image.size, Image.Resampling.BILINEAR)
    return Image.composite(image.convert("RGB"), Image.new("RGB", image.size, GRAY), shape)


def _by_prompt(drawn: Sequence[GeneratedImage]) -> dict[str, list[Image.Image]]:
    return {each.prompt: [other.image for other in drawn if other.prompt == each.prompt] for each in drawn}


def _scored(drawn: Sequence[GeneratedImage], columns: dict[str, Tensor]) -> tuple[Scored, ...]:
    rows = [{name: float(values[i]) for name, values in columns.items()} for i in range(len(drawn))]
    return tuple(
        Scored(prompt=each.prompt, text=each.text, seed=each.seed, image=each.image, scores=scores)
        for each, scores in zip(drawn, rows, strict=True)
    )


def _bytes(extractor: FeatureExtractor) -> int:
    return (
        sum(weight.numel() * weight.element_size() for weight in extractor.module.parameters())
        if extractor.module
        else 0
    )
