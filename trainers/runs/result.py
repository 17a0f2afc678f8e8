"""What a run learned, as data on the CPU."""

import json
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from ..formats import kohya, metadata


@dataclass(frozen=True, kw_only=True)
class RunResult:
    """What a run learned, on the CPU, and how it went."""

    folder: Path
    settings: dict
    dataset: str  # digest of the reference pictures and masks
    lora: dict[str, Tensor]  # kohya's names
    tokens: dict[str, tuple[Tensor, ...]]  # placeholder -> vectors [n, d] per text encoder
    fixed_outputs: tuple[Tensor, ...]  # [layers + 1, 77, d] per text encoder; empty where nothing is fixed
    history: list[dict]  # one entry per step, as in steps.jsonl
    stop_reason: str
    seconds: float
    adapters: dict[str, Tensor] = field(default_factory=dict)  # see causal.tensors
    complete: bool = True  # False: broken off; queued again it goes on
    origin: dict[str, str] = field(default_factory=dict)  # what else its files say of it: see metadata.origin
    stops: list[dict] = field(default_factory=list)  # where monitors fired: see stopping.stops
    picked: int = 0  # the step whose state this is, where it was picked among several; 0: the last

    @property
    def steps(self) -> int:
        """How many led to what was learned."""
        return self.picked or len(self.history)

    @property
    def placeholder_token(self) -> str:
        return self.settings["concept"]["placeholder_token"]

    @classmethod
    def read(cls, about: dict, lora: dict[str, Tensor], learned: dict[str, Tensor], folder: Path, history: list[dict]):
        """What files hold.

        Args:
            about: as in run.json: settings, dataset, stop_reason, seconds, complete; newer ones: origin, stops, picked.
            learned: as `export.carried` gives it.

        Raises:
            LookupError, TypeError, ValueError: something is missing or is not what it should be.
        """
        tokens, fixed_outputs, adapters = kohya.read_carried(learned)
        if tokens and about["settings"]["concept"]["placeholder_token"] not in tokens:
            raise LookupError("the new word")
        return cls(
            folder=folder,
            settings=about["settings"],
            dataset=about["dataset"],
            lora=lora,
            tokens=tokens,
            fixed_outputs=fixed_outputs,
            adapters=adapters,
            history=history,
            stop_reason=about["stop_reason"],
            seconds=about["seconds"],
            complete=about["complete"],
            origin={str(name): str(value) for name, value in dict(about.get("origin", {})).items()},
            stops=[dict(stop) for stop in about.get("stops", [])],
            picked=int(about.get("picked", 0)),
        )

    def learned(self) -> dict[str, Tensor]:
        """What a CLIP carries beside the LoRA, as one flat dictionary."""
        return kohya.carried(self.tokens, self.fixed_outputs, self.adapters)

    def metadata(self, name: str = "", kind: str = "lora") -> dict[str, str]:
        """What the safetensors files say about themselves: how they were made, and what LoRA browsers look for."""
        about = {"settings": self.settings, "dataset": self.dataset, "steps": self.steps}
        own = {"personalize": json.dumps({**about, "stop_reason": self.stop_reason})}
        return own | metadata.describe(self, name, kind)
