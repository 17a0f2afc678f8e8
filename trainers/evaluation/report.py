"""Results of an evaluation: every image's scores, their means, and how they were measured. Data only."""

import statistics
from collections.abc import Iterable
from dataclasses import dataclass, field

from PIL import Image

CLIP_T, DIVERSITY = "CLIP-T", "diversity"
COLUMNS = (CLIP_T, "CLIP-I seen", "CLIP-I unseen", "DINO seen", "DINO unseen", DIVERSITY)
NOT_MEASURED = "not measured"
FLOOR, CEILING = "floor", "ceiling"


@dataclass(frozen=True, kw_only=True)
class Scored:
    """An image and its scores by column; a column that could not be measured is absent."""

    prompt: str  # the text it was generated from
    text: str  # the text that CLIP-T compared it with
    seed: int
    image: Image.Image
    scores: dict[str, float]


@dataclass(frozen=True)
class Spread:
    """Mean and standard deviation (n - 1 in the denominator) of `n` values; of one value the deviation is 0."""

    mean: float
    std: float
    n: int

    @classmethod
    def of(cls, values: Iterable[float]) -> "Spread | None":
        """Return the spread of values; `None` of no value."""
        found = [*values]
        if not found:
            return None
        return cls(statistics.fmean(found), statistics.stdev(found) if len(found) > 1 else 0.0, len(found))


@dataclass(frozen=True, kw_only=True)
class Report:
    """One model's images with their scores.

    Attributes:
        label: name of the model, such as "base" or "trained".
        images: by prompt, then by seed.
        diversity: prompt -> mean distance of its images; prompts of a single image are absent.
        missing: column -> why it was not measured.
        metric_models: column -> name of the metric model.
        references: images of the subject for CLIP-I and DINO: "seen" in training, "unseen".
        settings: how the images were generated and scored.
        generation_seconds, scoring_seconds: per image, without loading the models; 0 where nothing was generated.
        role: FLOOR or CEILING where others are measured against it, else "".
    """

    label: str
    images: tuple[Scored, ...]
    diversity: dict[str, float] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)
    metric_models: dict[str, str] = field(default_factory=dict)
    references: dict[str, tuple[Image.Image, ...]] = field(default_factory=dict)
    settings: dict[str, str | int | float | bool] = field(default_factory=dict)
    generation_seconds: float = 0.0
    scoring_seconds: float = 0.0
    role: str = ""

    @property
    def title(self) -> str:
        """Label, and the role where there is one."""
        return f"{self.label} ({self.role})" if self.role else self.label

    def prompts(self) -> list[str]:
        return [*dict.fromkeys(each.prompt for each in self.images)]

    def seeds(self) -> list[int]:
        return [*dict.fromkeys(each.seed for each in self.images)]

    def of_prompt(self, prompt: str) -> list[Scored]:
        return [each for each in self.images if each.prompt == prompt]

    def spread(self, column: str, *, prompt: str | None = None, seed: int | None = None) -> Spread | None:
        """Return mean and deviation of a column over all images, a prompt's or a seed's; of diversity over prompts.

        `None` where nothing was measured.
        """
        if column == DIVERSITY:
            wanted = [] if seed is not None else self.diversity if prompt is None else [prompt]
            return Spread.of(self.diversity[each] for each in wanted if each in self.diversity)
        chosen = [
            each
            for each in self.images
            if (prompt is None or each.prompt == prompt) and (seed is None or each.seed == seed)
        ]
        return Spread.of(each.scores[column] for each in chosen if column in each.scores)

    def cell(self, column: str, digits: int = 3) -> str:
        """Return mean and deviation as text for a table."""
        found = self.spread(column)
        return NOT_MEASURED if found is None else f"{found.mean:.{digits}f} ± {found.std:.{digits}f}"

    def summary(self) -> str:
        """Return label, scores and time, in lines of text."""
        count = f"{len(self.prompts())} prompts x {len(self.seeds())} seeds"
        lines = [f"{self.title}: {len(self.images)} images, {count}"]
        for column in COLUMNS:
            by = self.metric_models.get(column) or self.missing.get(column, "")
            lines.append(f"{column}: {self.cell(column)}" + (f" ({by})" if by else ""))
        generation = f"{self.generation_seconds:.3f} s to generate, " if self.generation_seconds else ""
        lines.append(f"per image: {generation}{self.scoring_seconds:.3f} s to score")
        return "\n".join(lines)
