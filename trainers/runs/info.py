"""run.json as a type: what a run is, and how far it came. Read and written here, and nowhere else."""

import json
import math
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

from .. import files
from ..stopping.monitor import STOPPED_BY_USER

OWN = (
    "model",
    "lineage",
    "continued_from",
    "name",
    "checkpoint",
)  # what a run's folder says of it, and no file that leaves the folder


@dataclass(frozen=True, kw_only=True)
class RunInfo:
    """A run's description.

    Attributes:
        settings: as `Run.settings` gives them.
        dataset: digest of the reference images and masks.
        model: fingerprint of the weights that the run started from.
        lineage: what runs share that differ in their number of steps alone; see `Run.lineage`.
        origin: what the files say of the base model and the images; see `metadata.origin`.
        continued_from: the run and the step that this one began at, in words; empty if it began at step 0.
        complete: False until the training ended; an interrupted run resumes.
        stop_reason: how it ended or was interrupted, in words; empty while it has not.
        seconds: of training.
        steps: that led to what was learned.
        stops: where monitors fired; see `monitor.stops`.
        name: what its user calls it; may be empty.
        checkpoint: name of the file that the model was loaded from, where that is known.
    """

    settings: dict
    dataset: str
    model: str = ""
    lineage: str = ""
    origin: dict = field(default_factory=dict)
    continued_from: str = ""
    complete: bool = False
    stop_reason: str = ""
    seconds: float = 0.0
    steps: int = 0
    stops: list = field(default_factory=list)
    name: str = ""
    checkpoint: str = ""

    @property
    def placeholder_token(self) -> str:
        return self.settings["concept"]["placeholder_token"]

    @property
    def ended_by_user(self) -> bool:
        """Whether it is complete because its user ended the last stage."""
        stops = [stop.get("step") for stop in self.stops if stop.get("monitor") == STOPPED_BY_USER]
        return self.complete and self.steps in stops

    @classmethod
    def parse(cls, values) -> "RunInfo":
        """The description that plain JSON values hold; keys of other names are left out.

        Raises:
            LookupError, TypeError, ValueError: something is missing or is not of its type.
        """
        given = dict(values)
        known = [each.name for each in fields(cls) if each.name in given or each.name not in OWN]
        info = cls(**{name: given[name] for name in known})
        for each in fields(cls):
            value, kind = getattr(info, each.name), (int, float) if each.type is float else each.type
            # To the checker a field's type may be text; in this class none is.
            if not isinstance(value, kind) or (isinstance(value, bool) and each.type is not bool):  # type: ignore[arg-type]
                raise TypeError(f"{each.name} is {type(value).__name__}")
        if not isinstance(info.placeholder_token, str) or not isinstance(info.settings["method"], str):
            raise TypeError("a name is no text")
        if not all(isinstance(stop, dict) for stop in info.stops):
            raise TypeError("a stop is no object")
        if not (0 <= info.seconds < math.inf and info.steps >= 0):
            raise ValueError("a number is not possible")
        return info

    @classmethod
    def read(cls, folder: Path) -> "RunInfo | None":
        """The description in a run's folder; `None` where there is none that can be read."""
        try:
            return cls.parse(json.loads((folder / "run.json").read_text(encoding="utf-8")))
        except (OSError, ValueError, LookupError, TypeError, RecursionError):
            return None

    def write(self, folder: Path) -> None:
        with files.replaced(folder / "run.json") as beside:
            beside.write_text(json.dumps(asdict(self), indent=2), encoding="utf-8")
