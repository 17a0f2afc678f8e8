"""Choice among the states that Pick by Score saved in a run's folder."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from ..stopping.monitor import Monitor
from ..stopping.pick_by_score import PickByScore
from .folder import RunFolder
from .result import RunResult


@dataclass(frozen=True)
class Candidate:
    """A scored state; both scores are also scaled from 0, the floor, to 1, the best of the run."""

    step: int  # of all stages
    identity: float
    text: float
    scaled_identity: float
    scaled_text: float

    def score(self, text_weight: float) -> float:
        """Return the weighted mean of both scaled scores; `text_weight` 0 is identity alone."""
        return (1 - text_weight) * self.scaled_identity + text_weight * self.scaled_text


def candidates(history: Sequence[dict]) -> list[Candidate]:
    """Return the scored states in a run's log, in the order of their steps."""
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
    """Return the candidate with the highest score, the earliest of equal ones; `None` where there is none."""
    return max(candidates(history), key=lambda each: each.score(text_weight), default=None)


def picked(result: RunResult, text_weight: float) -> RunResult:
    """Return the result as it was after the preferred step; unchanged where nothing was scored.

    Raises:
        RuntimeError: the file of that state is gone or damaged.
    """
    best = preferred(result.history, text_weight)
    if best is None:
        return result
    found = RunFolder(result.folder).result(partial=True, step=best.step)
    if found is None:
        raise RuntimeError(
            f"The state after step {best.step} of run {result.folder.name} cannot be read: choose another "
            "text_weight, or delete the run with Runs and queue again."
        )
    count = len(candidates(result.history))
    scores = f"identity {best.identity:.3f}, text {best.text:.3f}"
    reason = f"{result.stop_reason}; of {count} scored states the one after step {best.step} is picked ({scores})"
    return replace(found, stop_reason=reason)


def chosen(result: RunResult, stopper: Sequence[Monitor]) -> RunResult:
    """Return the result picked by the preference among a run's monitors; unchanged where none of them scores."""
    weight = weight_of(stopper)
    return result if weight is None else picked(result, weight)


def weight_of(stopper: Sequence[Monitor]) -> float | None:
    """Return the preference of the first Pick by Score among monitors; `None` without one."""
    return next((monitor.text_weight for monitor in stopper if isinstance(monitor, PickByScore)), None)
