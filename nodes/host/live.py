"""The live view's data: events of running trainings, and the history of any run.

The view itself is js/personalize.js. It stores nothing: it shows what is sent from here, and asks by run digest.
"""

import json
import math
import re
import time
from collections import Counter
from pathlib import Path

from server import PromptServer

from ...trainers.runs.folder import RunFolder
from . import folders, internals

EVENT, WARNINGS = "personalize.step", "personalize.warnings"
INTERVAL = 0.2  # seconds between two events of a training
MOST = 1000  # points of a history that are sent, and as many more that have measurements
NEWEST = 8  # names of previews in an event
AWAY = 60.0  # seconds that a client may be away, as while its page is reloaded
RUNNING: dict[str, "Live"] = {}  # the trainings of this process, by run digest
REOPENED: Counter[str] = Counter()  # node id -> how often its user had an ended run train on


class Live:
    """Sends one running training to the editors: `with Live(...) as view`, and Callbacks with its methods."""

    def __init__(self, folder: Path, steps: int, hidden):
        """
        Args:
            steps: optimizer steps of all stages, by the recipe.
            hidden: the node's hidden inputs: its id, and its workflow if there is one.
        """
        context = internals.get_executing_context()
        self.folder, self.planned = folder, steps
        self.prompt = {"run": folder.name, **_place(hidden)}
        self.prompt |= {"prompt_id": context.prompt_id if context else None}
        self.entries: list[dict] = []  # since the last event
        self.stages: dict[str, int] = {}  # stage -> its steps, for the stages so far
        self.last: dict = {}  # the last line of the log
        self.sent, self.began, self.pace = -math.inf, (0.0, 0), 0.0  # began: time, and step of the stage
        self.finishing = False
        self.client = getattr(_server(), "client_id", None)  # who queued it; None: everybody
        self.seen = time.monotonic()  # when that client was last connected

    def __enter__(self) -> "Live":
        RUNNING[self.folder.name] = self
        return self

    def __exit__(self, *error) -> None:
        del RUNNING[self.folder.name]
        if self.last:
            self.send(running=False)

    def finish(self) -> bool:
        """Return whether a user asked since the last call to end the current stage: `Callbacks.finish`."""
        asked, self.finishing = self.finishing, False
        return asked

    def add(self, entry: dict) -> None:
        """Add a line of steps.jsonl."""
        if not self.last and entry["step"] > 1:  # a resumed run: read its earlier stages
            self.stages = {e["stage"]: e["steps"] for e in read(self.folder)[: entry["step"] - 1]}
        if self.last and entry["stage"] != self.last["stage"]:
            self.finishing = False  # a request in the last moments of a stage does not mean the next one
        now = time.monotonic()
        if entry["stage"] != self.last.get("stage") or entry["step"] <= self.last["step"]:
            self.began = now, entry["stage_step"]
        elif entry["stage_step"] - self.began[1] >= 2:  # until then the previous stage's pace is the better estimate
            self.pace = (now - self.began[0]) / (entry["stage_step"] - self.began[1])
        self.stages[entry["stage"]] = entry["steps"]
        self.last = entry
        self.entries.append(compact(entry))
        if now - self.sent >= INTERVAL:
            self.send()

    def steps(self) -> int:
        """Return the expected last step over all stages, given that earlier stages may have ended early."""
        if not self.last:
            return self.planned
        to_come = max(0, self.planned - sum(self.stages.values()))
        return self.last["step"] + self.last["steps"] - self.last["stage_step"] + to_come

    def seconds_left(self) -> float | None:
        """Return the remaining seconds at the pace of this stage, evaluations included; `None` while unknown."""
        return round(self.pace * (self.steps() - self.last["step"]), 1) if self.pace else None

    def words(self) -> str:
        """Return the progress as one line of text, for nodes without the live view."""
        entry, left = self.last, self.seconds_left() or 0
        soon = f", about {left / 60:.0f} minutes left" if left >= 60 else ""
        return f"{entry['stage']}: step {entry['stage_step']} of {entry['steps']}, loss {entry['loss']:.4f}{soon}"

    def send(self, running: bool = True) -> None:
        """Send what is new to the editor that queued the training; one opened later asks for the rest."""
        entry, entries = self.last, self.entries
        self.entries, self.sent = [], time.monotonic()
        stage = {"stage": entry["stage"], "stage_step": entry["stage_step"], "stage_steps": entry["steps"]}
        event = self.prompt | stage | {"step": entry["step"], "steps": self.steps(), "entries": entries}
        event |= {"seconds": entry["seconds"], "seconds_left": self.seconds_left(), "running": running}
        _send(EVENT, event | {"previews": previews(self.folder)[-NEWEST:]}, self.owner())

    def owner(self) -> str | None:
        """Return the client whose training it is; `None` where it is everybody's.

        A browser that is closed and opened again is another client to the host. With only one user, a training whose
        client has been away for a minute is everybody's from then on.
        """
        server = _server()
        if server is None or self.client in server.sockets:
            self.seen = time.monotonic()
        elif not internals.args.multi_user and time.monotonic() - self.seen > AWAY:
            self.client = None
        return self.client


def _server():
    return getattr(PromptServer, "instance", None)  # a test imports the nodes without a server


def warn(hidden, sentences: list[str]) -> None:
    """Show sentences on a node in the editor that queued it, in place of earlier ones, until its next graph runs."""
    _send(WARNINGS, _place(hidden) | {"sentences": sentences}, getattr(_server(), "client_id", None))


def _send(event: str, data: dict, client: str | None) -> None:
    if server := _server():
        server.send_sync(event, data, client)


def _place(hidden) -> dict[str, str | None]:
    return {"node": str(hidden.unique_id), "workflow": _workflow_id(hidden)}


def _workflow_id(hidden) -> str | None:
    """Return the id of the editor's workflow; `None` where a client sends something else, which the host passes on."""
    value = hidden.extra_pnginfo
    for name in ("workflow", "id"):
        value = value.get(name) if isinstance(value, dict) else None
    return value if isinstance(value, str) else None


# ---------------------------------------------------------------------------------------------------------------------
# Contents of a run's folder


def history(digest: str) -> dict | None:
    """Return what the live view needs to plot a running or finished run; `None` if the run does not exist."""
    folder = folders.runs_folder() / digest
    info = RunFolder(folder).info()
    if info is None:
        return None
    entries, view, settings = read(folder, MOST), RUNNING.get(digest), info.settings
    return {
        "run": digest,
        "method": settings.get("method"),
        "word": settings["concept"]["placeholder_token"],
        "stopper": settings.get("stopper", []),
        "steps": view.steps() if view else entries[-1]["step"] if entries else 0,
        "seconds": entries[-1].get("seconds", 0) if entries else 0,
        "entries": [compact(entry) for entry in entries],
        "stops": info.stops,
        "stop_reason": "" if view else info.stop_reason,
        "running": view is not None,
        "can_go_on": view is None and info.ended_by_user and (folder / "last.safetensors").is_file(),
        "previews": previews(folder),
    }


def read(folder: Path, most: int | None = None) -> list[dict]:
    """Return the log's steps, thinned to `most`, without lines that are incomplete or not a step."""
    try:
        lines = (folder / "steps.jsonl").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
    return [entry for line in (thinned(lines, most) if most else lines) if (entry := _entry(line))]


def _entry(line: str) -> dict | None:
    try:
        entry = json.loads(line)
        known = isinstance(entry["step"], int) and isinstance(entry["loss"], float) and isinstance(entry["stage"], str)
        return entry if known else None
    except (ValueError, LookupError, TypeError, RecursionError):
        return None


def thinned(lines: list[str], most: int) -> list[str]:
    """Return about `most` evenly spaced lines, as many with measurements, each stage's first line and the last two.

    Works on text, because parsing a hundred thousand steps takes a second and most of them are dropped.
    """
    measured = [i for i, line in enumerate(lines) if '"measures": {"' in line]
    first = [i for i, line in enumerate(lines) if '"stage_step": 1,' in line or '"stage_step": 1}' in line]
    keep = {*_every(range(len(lines)), most), *_every(measured, most), *first, *range(len(lines))[-2:]}
    return [lines[i] for i in sorted(keep)]


def _every(indices, most: int):
    return indices[:: max(1, -(-len(indices) // most))]


def compact(entry: dict) -> dict:
    """Reduce a line of the log to what is plotted, without NaN and infinite values, which JSON cannot hold."""
    kept = {"step": entry["step"], "stage": entry["stage"], "loss": float(f"{entry['loss']:.5g}")}
    return kept | {name: found for name in ("start", "measures") if (found := _numbers(entry.get(name)))}


def _numbers(measures) -> dict[str, dict[str, float]]:
    monitors = measures.items() if isinstance(measures, dict) else ()
    return {
        monitor: {
            name: value for name, value in values.items() if isinstance(value, int | float) and math.isfinite(value)
        }
        for monitor, values in monitors
        if isinstance(values, dict)
    }


def previews(folder: Path) -> list[str]:
    """Return the file names of the previews in the order of their steps; `/view` serves them."""
    names = [re.fullmatch(r"step_(\d+)\.png", file.name) for file in (folder / "previews").glob("step_*.png")]
    return [name[0] for name in sorted(filter(None, names), key=lambda name: int(name[1]))]
