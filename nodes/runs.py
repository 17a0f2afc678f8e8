"""Load and Runs: what earlier trainings left in output/personalize/runs."""

import re
import time

from comfy_api.latest import io, ui

from ..trainers.runs.folder import RunFolder
from ..trainers.runs.pick import picked
from ..trainers.stopping.pick_by_score import PickByScore
from ..trainers.text import quoted
from .apply import EXACT, apply
from .host.folders import runs_folder
from .host.session import notices
from .schema import checked, valid
from .sockets import CATEGORY, ResultSocket

NONE = "there is no run yet"


def folders() -> list[RunFolder]:
    """All runs, the newest first."""
    files = [file for file in runs_folder().glob("*/run.json") if re.fullmatch(r"[0-9a-f]{16}", file.parent.name)]
    return [RunFolder(file.parent) for file in sorted(files, key=lambda file: file.stat().st_mtime, reverse=True)]


def labels() -> list[str]:
    """One line per run, the newest first; it ends with the run's digest."""
    return [_label(folder) for folder in folders()] or [NONE]


def _label(folder: RunFolder) -> str:
    info = folder.info()
    if info is None:
        return f"? damaged {folder.path.name}"
    state = "" if info.complete else ", interrupted" if info.stop_reason else ", not finished"
    return f"{info.placeholder_token} {info.settings['method']}, {info.steps} steps{state} {folder.path.name}"


def find(label: object) -> RunFolder:
    """The run that a label, or a digest alone, names.

    Raises:
        ValueError: there is no such run.
    """
    digest = str(label).rsplit(" ", 1)[-1]  # the host does not see to it that a choice is text
    for folder in folders():
        if folder.path.name == digest:
            return folder
    raise ValueError(f"There is no run {quoted(str(label))}: choose one of the list (press R to refresh it).")


class Load(io.ComfyNode):
    """An earlier run -> MODEL and CLIP as its training returned them, and its RESULT."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PersonalizeLoad",
            display_name="Load Personalized",
            category=CATEGORY,
            description="Restores what an earlier training learned, without its pictures and without training.",
            search_aliases=["restore", "run", "load lora", "checkpoint"],
            inputs=[
                io.Model.Input("model", tooltip="The model that the run was trained on, or one like it."),
                io.Clip.Input("clip"),
                io.Combo.Input(
                    "run", options=labels(), tooltip="The newest first. A run that was broken off loads too."
                ),
                io.Boolean.Input("exact", default=False, advanced=True, optional=True, tooltip=EXACT),
                io.Float.Input(
                    "text_weight", default=PickByScore.text_weight, min=0.0, max=1.0, step=0.01, optional=True,
                    display_mode=io.NumberDisplay.slider, advanced=True,
                    tooltip="Of a run with Pick by Score: 0 loads the state with most likeness, 1 the one that follows "
                    "words best.",
                ),
            ],
            outputs=[
                io.Model.Output(display_name="model"),
                io.Clip.Output(display_name="clip"),
                ResultSocket.Output(display_name="result"),
            ],
            hidden=[io.Hidden.unique_id],
        )  # fmt: skip

    @classmethod
    def validate_inputs(cls, run: str | None = None) -> bool | str:
        """Instead of the host's own check: a run's line changes when it ends, its digest does not."""
        return valid(find, run)

    @classmethod
    def fingerprint_inputs(cls, run: str | None = None, **others) -> float:
        return time.time() if run is None else (find(run).path / "run.json").stat().st_mtime

    @classmethod
    @checked
    def execute(cls, model, clip, run, exact=False, text_weight=PickByScore.text_weight) -> io.NodeOutput:
        folder = find(run)
        result = folder.result(partial=True)
        if result is None:
            raise ValueError(
                f"The run {folder.path.name} holds nothing that can be loaded: queue its training again, or delete it."
            )
        result = picked(result, text_weight)
        notices(cls.hidden.unique_id)(f"{result.placeholder_token}: {result.stop_reason}")
        return io.NodeOutput(*apply(model, clip, result, in_full_precision=exact), result)


class Runs(io.ComfyNode):
    """A list of the runs with their sizes, and a way to delete one."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PersonalizeRuns",
            display_name="Runs",
            category=CATEGORY,
            description="Lists what trainings left on the disk, and deletes a run when told to.",
            search_aliases=["delete", "disk space", "clean up", "trainings"],
            is_output_node=True,
            inputs=[
                io.Combo.Input("action", options=["list", "delete"], tooltip="delete removes the run below for good."),
                io.Combo.Input("run", options=labels()),
            ],
            outputs=[io.String.Output(display_name="runs")],
        )

    @classmethod
    def validate_inputs(cls, action: str | None = None, run: str | None = None) -> bool | str:
        return valid(find, run) if action == "delete" else True

    @classmethod
    def fingerprint_inputs(cls, **inputs) -> float:
        return time.time()  # the disk changes without the graph

    @classmethod
    @checked
    def execute(cls, action, run) -> io.NodeOutput:
        lines = []
        if action == "delete":
            folder = find(run)
            folder.delete()
            lines.append(f"Deleted {run}.")
        sizes = [(_label(folder), folder.size()) for folder in folders()]
        lines += [f"{size / 2**20:8.1f} MB  {label}" for label, size in sizes]
        lines.append(f"{len(sizes)} runs, {sum(size for _, size in sizes) / 2**20:.1f} MB")
        return io.NodeOutput("\n".join(lines), ui=ui.PreviewText("\n".join(lines)))
