"""Plot History: the curves of a training as an image, as files for other programs, and as a summary."""

import time
from pathlib import Path

from comfy_api.latest import io, ui

from ..trainers.evaluation.prompt_folders import folder_of
from ..trainers.files import replaced
from ..trainers.reports import history, history_export, history_plot
from ..trainers.runs.result import RunResult
from ..trainers.text import quoted, reason, remedy
from .host import folders, session
from .host.run_list import find, labels
from .schema import checked, valid
from .sockets import EVALUATION_FOLDER, ResultSocket

CONNECTED = "the connected result"


class PlotHistory(io.ComfyNode):
    """Plots a RESULT's curves, and writes CSV, JSON and TensorBoard events below the output folder."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PersonalizePlotHistory",
            display_name="Plot History",
            category=EVALUATION_FOLDER,
            description="Plots a training: its loss, what the monitors measured, and where and why it stopped.",
            search_aliases=["loss", "curve", "graph", "chart", "tensorboard", "csv", "log"],
            is_output_node=True,
            inputs=[
                ResultSocket.Input("result", optional=True),
                io.Combo.Input(
                    "scale", options=["linear", "log"],
                    tooltip="Scale of the loss axes; log shows small changes of small losses."
                ),
                io.Int.Input(
                    "running_mean", default=25, min=1, max=10_000, advanced=True,
                    tooltip="Number of steps that the loss's running mean, the thick line, averages.",
                ),
                io.Int.Input(
                    "width", default=1024, min=512, max=4096, step=8, advanced=True,
                    tooltip="Width of the image in pixels.",
                ),
                io.Int.Input(
                    "panel_height", default=240, min=160, max=1024, step=8, advanced=True,
                    tooltip="Height of each panel in pixels.",
                ),
                io.Boolean.Input("save", default=False, tooltip="Also write the history as CSV and JSON."),
                io.Boolean.Input(
                    "tensorboard", default=False, advanced=True,
                    tooltip="Also write TensorBoard events; the package tensorboard has to be installed.",
                ),
                io.String.Input(
                    "prefix", default="personalize/history", advanced=True,
                    tooltip="Folder inside the output folder for these files; each run gets a subfolder.",
                ),
                ResultSocket.Input(
                    "second_result", optional=True, tooltip="Second training to plot over the first."
                ),
                io.Combo.Input(
                    "run", options=[CONNECTED, *labels()], default=CONNECTED, optional=True,
                    tooltip="Run to plot: that of the connected result, or another, the newest first.",
                ),
            ],
            outputs=[
                io.Image.Output(display_name="image", tooltip="The plot, a panel per quantity."),
                io.String.Output(
                    display_name="csv", tooltip="Path below the output folder; empty if nothing was written.",
                ),
                io.String.Output(display_name="summary", tooltip="Stages, stops and last values as text."),
                io.LossMap.Output(display_name="loss map", tooltip="The losses, for the stock Plot Loss Graph."),
            ],
        )  # fmt: skip

    @classmethod
    def validate_inputs(
        cls, prefix: str | None = None, tensorboard: bool | None = None, run: str | None = None
    ) -> bool | str:
        """Check what is known before the graph runs, which may train for hours before it reaches this node."""
        if (answer := valid(lambda chosen: chosen == CONNECTED or find(chosen), run)) is not True:
            return answer
        if (answer := valid(_folder, prefix)) is not True:
            return answer
        return valid(lambda wanted: wanted and history_export.check_tensorboard(), tensorboard)

    @classmethod
    def fingerprint_inputs(cls, run: str | None = CONNECTED, **others) -> float:
        if run in (None, CONNECTED):
            return time.time() if run is None else 0.0
        return (find(run).path / "run.json").stat().st_mtime

    @classmethod
    @checked
    def execute(
        cls, scale, running_mean, width, panel_height, save, tensorboard, prefix, result=None, second_result=None,
        run=CONNECTED,
    ) -> io.NodeOutput:  # fmt: skip
        result = _chosen(result, run)
        runs = [result, second_result] if second_result else [result]
        size = {"width": width, "panel_height": panel_height}
        image = history_plot.image(runs, **size, log=scale == "log", mean_of=running_mean)
        summary = "\n\n".join(history.summary(run, running_mean) for run in runs)
        csv = _write(result, folder_of(prefix), save, tensorboard)
        losses = {"loss": [entry["loss"] for entry in history.entries(result)]}  # the form of core's Train LoRA
        shown = session.preview(image, cls) | ui.PreviewText(summary).as_dict()
        return io.NodeOutput(image, csv, summary, losses, ui=shown)


def _chosen(result: RunResult | None, run: str) -> RunResult:
    """Return the result of a run on disk, or the connected one."""
    chosen = result if run == CONNECTED else find(run).result(partial=True)
    if chosen is None:
        raise ValueError(
            "There is no training to plot: connect a result, or choose a run that has one."
            if run == CONNECTED
            else f"The run {quoted(run)} has no result: choose another, or queue its training again."
        )
    return chosen


def _folder(prefix: str) -> Path:
    return Path(folders.inside_output(folder_of(prefix)))


def _write(result: RunResult, prefix: str, save: bool, tensorboard: bool) -> str:
    """Write the wanted files; return the CSV's path below the output folder, "" where it is not written."""
    name = f"{prefix}/{history_export.folder_name(result)}"
    folder, entries = Path(folders.inside_output(name)), history.entries(result)
    try:
        if save or tensorboard:
            folder.mkdir(parents=True, exist_ok=True)
        if save:
            for file, text in (("csv", history_export.as_csv(entries)), ("json", history_export.as_json(result))):
                with replaced(folder / f"history.{file}") as temporary:
                    temporary.write_text(text, encoding="utf-8", newline="\n")
        if tensorboard:
            history_export.write_events(entries, folder / "history.tfevents", history_export.started(result))
    except OSError as error:
        raise RuntimeError(
            f"The history cannot be written ({reason(error)}): {remedy(error)}, or choose another prefix."
        ) from error
    return f"{name}/history.csv" if save else ""
