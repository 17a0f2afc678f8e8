"""What a run learned, as data on the CPU."""

import json
from dataclasses import dataclass, field, replace
from pathlib import Path

from torch import Tensor

from ..data.concept import check_word
from ..formats import kohya, metadata
from ..formats.foreign import DAMAGED
from ..models.timestep_lora import RankSchedule
from ..models.tokenizer import ROOM, Tokenizer, bundled_words
from ..text import quoted
from ..training.trainables import check_placeholder
from .info import RunInfo


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
    adapters: dict[str, Tensor] = field(default_factory=dict)  # see causal_adapters.tensors
    rank_schedule: RankSchedule | None = None  # of the U-Net's LoRA, if it is a T-LoRA
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
    def read(
        cls, info: RunInfo, lora: dict[str, Tensor], learned: dict[str, Tensor], folder: Path, history: list[dict]
    ) -> "RunResult":
        """The result that a run's files hold.

        Args:
            learned: as `kohya.carried` gives it.

        Raises:
            LookupError, TypeError, ValueError: something is missing or is not what it should be.
        """
        tokens, fixed_outputs, adapters, ranks = kohya.read_carried(learned)
        if tokens and info.placeholder_token not in tokens:
            raise LookupError("the placeholder token")
        return cls(
            folder=folder,
            settings=info.settings,
            dataset=info.dataset,
            lora=lora,
            tokens=tokens,
            fixed_outputs=fixed_outputs,
            adapters=adapters,
            rank_schedule=RankSchedule.read(ranks) if ranks else None,
            history=history,
            stop_reason=info.stop_reason,
            seconds=info.seconds,
            complete=info.complete,
            origin={str(name): str(value) for name, value in info.origin.items()},
            stops=info.stops,
        )

    def learned(self) -> dict[str, Tensor]:
        """What a CLIP carries beside the LoRA, as one flat dictionary."""
        ranks = (self.rank_schedule.rank, self.rank_schedule.min_rank) if self.rank_schedule else ()
        return kohya.carried(self.tokens, self.fixed_outputs, self.adapters, ranks)

    def metadata(self, name: str = "", kind: str = "lora") -> dict[str, str]:
        """What the safetensors files say about themselves: how they were made, and what LoRA browsers look for."""
        about = {"settings": self.settings, "dataset": self.dataset, "steps": self.steps}
        own = {"personalize": json.dumps({**about, "stop_reason": self.stop_reason})}
        return own | metadata.describe(self, name, kind)


def complete(result: RunResult, name: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Everything a run learned as one file's tensors and header."""
    names = (
        "settings",
        "dataset",
        "history",
        "stop_reason",
        "seconds",
        "complete",
        "origin",
        "stops",
        "picked",
        "steps",
    )
    about = {each: getattr(result, each) for each in names}
    header = result.metadata(name) | {"personalize": json.dumps(about)}
    return kohya.complete(result.lora, result.learned()), header


def read_complete(state: dict[str, Tensor], header: dict[str, str], file: Path) -> RunResult:
    """The inverse of `complete`.

    Raises:
        ValueError: another file.
    """
    try:
        about = json.loads(header["personalize"])
        lora, learned = kohya.read_complete(state)
        result = RunResult.read(RunInfo.parse(about), lora, learned, file.with_suffix(""), list(about["history"]))
        result = replace(result, picked=int(about["picked"]))
        whole = result.learned().keys() == learned.keys() and all(isinstance(e, dict) for e in result.history)
    except (LookupError, TypeError, ValueError, RecursionError):
        whole = False
    if not whole:
        raise ValueError(DAMAGED)
    for token, vectors in result.tokens.items():
        _check_token(token, vectors)
    return result


def _check_token(token: str, vectors: tuple[Tensor, ...]) -> None:
    """Raise `ValueError` unless a token of a file can stand in prompts: a file may be anybody's."""
    try:
        check_word(token)
        check_placeholder(Tokenizer(bundled_words()), token)
    except ValueError:
        raise ValueError(
            f"This file names its placeholder token {quoted(token)}, which would change other prompts: save the result "
            "again with a token such as <dog>."
        ) from None
    if not all(each.ndim == 2 and each.is_floating_point() and 0 < len(each) <= ROOM for each in vectors):
        raise ValueError(
            f"This file does not hold 1 to {ROOM} vectors for its placeholder token {token}: save the result again."
        )


def from_other_programs(
    name: str, lora: dict[str, Tensor], header: dict[str, str], tokens: dict[str, tuple[Tensor, ...]]
) -> RunResult:
    """What other programs learned, as a result of this pack.

    Args:
        name: of the files, without their endings.
        header: of the LoRA; what sd-scripts said of it is said again when the result is saved.
        tokens: vectors by placeholder token, the result's own first; may be empty.
    """
    return RunResult(
        folder=Path(name),
        settings={"method": name, "concept": {"placeholder_token": next(iter(tokens), "")}},
        dataset="",
        lora=lora,
        tokens=tokens,
        fixed_outputs=(),
        history=[],
        stop_reason="loaded from files",
        seconds=0.0,
        origin={key: value for key, value in header.items() if key.startswith("ss_")},
    )
