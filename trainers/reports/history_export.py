"""A run's history as files for other programs: CSV, JSON, TensorBoard's events."""

import importlib.util
import json
import math
import re
from pathlib import Path

from ..files import replaced
from ..runs.result import RunResult
from .csv_json import table

FIRST = ("step", "stage", "stage_step", "seconds", "loss")
START = "start/"
NO_TENSORBOARD = (
    "TensorBoard is not installed: run `pip install tensorboard` with the Python that runs ComfyUI, or switch "
    "tensorboard off."
)


def folder_name(result: RunResult) -> str:
    """Return the run's name without characters that a file system may refuse."""
    return re.sub(r"\W+", "_", result.folder.name)[:48].strip("_") or "run"


def rows(history: list[dict]) -> list[dict]:
    """Return a row per entry of `history.entries`, with columns such as `terms/denoising` and `DVAR/ratio`.

    Measurements before a stage's first step are `start/DVAR/ratio` in the row of that step.
    """
    return [{name: entry[name] for name in FIRST} | _values(entry) for entry in history]


def _values(entry: dict) -> dict[str, float]:
    values = {f"terms/{name}": value for name, value in entry["terms"].items()}
    for prefix, measured in (("", entry["measures"]), (START, entry["start"])):
        for monitor, found in measured.items():
            values |= {f"{prefix}{monitor}/{name}": value for name, value in found.items()}
    return values


def as_csv(history: list[dict]) -> str:
    """Return the rows as CSV; missing values are empty."""
    found = rows(history)
    return table(sorted({name: None for row in found for name in row}, key=_place), found)


def _place(column: str) -> int:
    """Order columns: common ones, terms, monitors, measurements before the first step."""
    kinds = (column in FIRST, column.startswith("terms/"), not column.startswith(START), True)
    return kinds.index(True)


def as_json(result: RunResult) -> str:
    """Return history and settings of a run as JSON; NaN and infinite values are null."""
    names = ("settings", "stop_reason", "stops", "seconds", "complete", "history")
    return json.dumps({"run": result.folder.name} | {name: _plain(getattr(result, name)) for name in names}, indent=1)


def _plain(value: object) -> object:
    if isinstance(value, dict):
        return {key: _plain(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_plain(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def check_tensorboard() -> None:
    """Raise `ValueError` if TensorBoard is not installed."""
    if not importlib.util.find_spec("tensorboard"):
        raise ValueError(NO_TENSORBOARD)


def write_events(history: list[dict], path: Path, started: float = 0.0) -> None:
    """Write one scalar per column of numbers; measurements before a step count as one step earlier.

    Args:
        path: with `tfevents` in its name, by which TensorBoard recognizes its files.
        started: seconds since 1970, to which the history's own are added.
    """
    check_tensorboard()
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.compat.proto.summary_pb2 import Summary
    from tensorboard.summary.writer.record_writer import RecordWriter

    with replaced(path) as temporary, temporary.open("wb") as file:
        records = RecordWriter(file)
        records.write(Event(wall_time=started, file_version="brain.Event:2").SerializeToString())
        for step, seconds, name, value in _scalars(history):
            summary = Summary(value=[Summary.Value(tag=name, simple_value=value)])
            records.write(Event(wall_time=started + seconds, step=step, summary=summary).SerializeToString())


def _scalars(history: list[dict]) -> list[tuple[int, float, str, float]]:
    """Return step, seconds, tag and value, in the order of time."""
    found, before = [], 0.0
    for row in rows(history):
        step, seconds = row["step"], row["seconds"]
        start = {name: value for name, value in row.items() if name.startswith(START)}
        later = {name: value for name, value in row.items() if name not in start and name not in ("step", "stage")}
        found += [(step - 1, before, name.removeprefix(START), value) for name, value in start.items()]
        found += [(step, seconds, name, value) for name, value in later.items()]
        before = seconds
    return found


def started(result: RunResult) -> float:
    """Return when the training began, by the time of run.json, in seconds since 1970; 0 without one."""
    about = result.folder / "run.json"
    return about.stat().st_mtime - result.seconds if about.is_file() else 0.0
