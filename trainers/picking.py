"""Pick by score: of the states that a training went through, the one that its user prefers.

Every so many steps the model draws a few prompts. Identity is how alike the pictures are to the references, text how
well they follow their prompts. What trades one for the other is the user's to say, afterwards: every state that was
scored stays in the run's folder, and another preference reads another file.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from PIL import Image

from . import evaluation, sampling
from .backbones import ClipChoice
from .data import captions_of
from .encoders import DinoChoice
from .folder import RunFolder, RunResult
from .previews import to_pil
from .prompt_list import SUBJECT, prompts_of
from .settings import part, same, setting
from .stopping import FixedSteps, Measure, Meter, Monitor, Sight, Silent

DINO, CLIP_I = "DINO", "CLIP-I"
PROMPTS = "a photo of a {} on the beach\na photo of a {} in the snow\na photo of a {} in the jungle\na painting of a {}"


@dataclass(frozen=True, kw_only=True)
class PickByScore(Silent):
    """What is scored and when, and what the user prefers."""

    text_weight: float = setting(
        0.5,
        "What you prefer: 0 is likeness alone, 1 is pictures that follow their words. Another value picks another "
        "state of the same training.",
        min=0.0,
        max=1.0,
        slider=True,
        later=True,
    )
    every: int = setting(25, "Steps between scores; the last step is always scored.", min=1, max=100_000)
    prompts: str = setting(PROMPTS, "What is drawn to be scored, one prompt per line; {} is the subject.", lines=True)
    seeds: int = setting(2, "Pictures of each prompt.", min=1, max=64)
    guidance: float = setting(7.5, "Guidance (cfg) of these pictures.", min=1.0, max=30.0)
    sampler_steps: int = setting(20, "Sampler steps of these pictures: most of what a score costs.", min=1, max=1000)
    identity: str = setting(DINO, "What tells how alike a picture is to the references.", options=(DINO, CLIP_I))
    stage: str = same(FixedSteps, "stage", "all")
    # Not "seed": the editor would draw another one at each queue, and train again.
    first_seed: int = setting(
        0, "Of these pictures; the others of a prompt follow it.", min=0, max=2**63 - 65, advanced=True
    )
    clip_model: str = same(ClipChoice, "clip_model")
    clip_weights: str = same(ClipChoice, "clip_weights")
    clip_download: bool = same(ClipChoice, "clip_download")
    dino_model: str = same(DinoChoice, "dino_model")
    dino_weights: str = same(DinoChoice, "dino_weights")
    dino_download: bool = same(DinoChoice, "dino_download")

    name = "Pick by Score"
    keep = "all"
    act = False
    min_steps = 0
    max_steps = 0

    def __post_init__(self):
        """Raises ValueError: no prompt has the subject in it."""
        if not any(SUBJECT in line for line in captions_of(self.prompts)):
            raise ValueError("No prompt to score has the subject in it: write prompts with {}, one per line.")

    @property
    def judges(self) -> tuple[ClipChoice | DinoChoice, ...]:
        """Of text, then of identity."""
        clip = part(ClipChoice, self)
        return clip, (part(DinoChoice, self) if self.identity == DINO else clip)

    def meter(self, sight: Sight) -> Meter:
        look, last = Scores(self, sight), sight.stage.steps

        def measure(step: int, past: list[Measure]) -> Measure | None:
            if step == 0:
                return look.floors()
            return None if step % self.every and step != last else look()

        return measure


class Scores:
    """Identity and text of the pictures that the model draws now, of the same prompts and noise each time."""

    def __init__(self, settings: PickByScore, sight: Sight):
        self.settings, self.models, self.device = settings, sight.models, sight.device
        self.references = [to_pil(image) for image in sight.concept.images]
        self.size = sight.concept.sizes(sight.models.resolution)[0]
        self.prompts, self.texts = (
            [line for line in prompts_of(settings.prompts, subject) for _ in range(settings.seeds)]
            for subject in (sight.subject, sight.concept.class_word)
        )

    def __call__(self) -> Measure:
        """`identity` and `text`, means over the pictures."""
        pictures = self.draw(self.prompts)
        return {"identity": self.identity(pictures), "text": self.text(pictures, self.texts)}

    def floors(self) -> Measure:
        """What each score is of pictures that have none of it.

        `identity_floor`: of pictures of the class, as the model draws them before it learns. `text_floor`: of the
        references themselves, which follow no prompt.
        """
        texts = [*dict.fromkeys(self.texts)]
        pairs = [(picture, text) for picture in self.references for text in texts]
        return {
            "identity_floor": self.identity(self.draw(self.texts)),
            "text_floor": self.text([picture for picture, _ in pairs], [text for _, text in pairs]),
        }

    def draw(self, prompts: Sequence[str]) -> list[Image.Image]:
        count, first = self.settings.seeds, self.settings.first_seed
        seeds = [first + i % count for i in range(len(prompts))]
        options = {"size": self.size, "steps": self.settings.sampler_steps, "guidance": self.settings.guidance}
        with self.device.autocast():
            pictures = sampling.sample_as_fits(self.models, self.models.tokenize([*prompts]), seeds, **options)
        return [to_pil(picture) for picture in pictures]

    def identity(self, pictures: Sequence[Image.Image]) -> float:
        score = evaluation.dino if self.settings.identity == DINO else evaluation.clip_image
        with self.models.backbones.on(self.device.device, self.settings.judges[1]) as judge:
            return float(score(judge, pictures, self.references).mean())

    def text(self, pictures: Sequence[Image.Image], texts: Sequence[str]) -> float:
        with self.models.backbones.on(self.device.device, self.settings.judges[0]) as judge:
            return float(evaluation.clip_text(judge, pictures, texts).mean())


@dataclass(frozen=True)
class Candidate:
    """A state that was scored; both scores are also told from 0, the floor, to 1, the best of the run."""

    step: int  # of all stages
    identity: float
    text: float
    scaled_identity: float
    scaled_text: float

    def score(self, text_weight: float) -> float:
        return (1 - text_weight) * self.scaled_identity + text_weight * self.scaled_text


def candidates(history: Sequence[dict]) -> list[Candidate]:
    """The states that a run's log has scores of, in the order of their steps."""
    name = PickByScore.name
    found = [(entry["step"], entry["measures"][name]) for entry in history if name in entry.get("measures", {})]
    floors = [entry["start"][name] for entry in history if name in entry.get("start", {})]
    if not found or not floors:
        return []

    def scaled(kind: str) -> list[float]:
        floor, values = floors[0][f"{kind}_floor"], [scores[kind] for _, scores in found]
        room = max(values) - floor
        return [(value - floor) / room if room > 0 else 0.0 for value in values]

    parts = zip(found, scaled("identity"), scaled("text"), strict=True)
    return [Candidate(step, scores["identity"], scores["text"], *both) for (step, scores), *both in parts]


def preferred(history: Sequence[dict], text_weight: float) -> Candidate | None:
    """The candidate with the highest score, the earliest of equal ones; `None` where there is none."""
    return max(candidates(history), key=lambda each: each.score(text_weight), default=None)


def picked(result: RunResult, text_weight: float) -> RunResult:
    """The result as it was after the preferred step; as it is, where nothing was scored.

    Raises:
        RuntimeError: the file of that state is gone or damaged.
    """
    best = preferred(result.history, text_weight)
    if best is None:
        return result
    found = RunFolder(result.folder).result(partial=True, step=best.step)
    if found is None:
        raise RuntimeError(
            f"The state after step {best.step} of run {result.folder.name} cannot be read: move text_weight, or delete "
            "the run with Runs and queue again."
        )
    count = len(candidates(result.history))
    scores = f"identity {best.identity:.3f}, text {best.text:.3f}"
    reason = f"{result.stop_reason}; of {count} scored states the one after step {best.step} is picked ({scores})"
    return replace(found, stop_reason=reason)


def chosen(result: RunResult, stopper: Sequence[Monitor]) -> RunResult:
    """The same by the preference among a run's monitors; as it is, where none of them scores."""
    weight = weight_of(stopper)
    return result if weight is None else picked(result, weight)


def weight_of(stopper: Sequence[Monitor]) -> float | None:
    return next((monitor.text_weight for monitor in stopper if isinstance(monitor, PickByScore)), None)
