"""Report: one or several REPORTs as a table, an image grid, an HTML page and files for other programs."""

from dataclasses import replace
from pathlib import Path

from comfy_api.latest import io, ui
from torch import Tensor

from ...trainers.evaluation.prompt_folders import folder_of
from ...trainers.evaluation.report import CEILING, FLOOR, Report
from ...trainers.reports import csv_json, report_folder
from ...trainers.reports.grid import PROMPTS, REPORTS
from ...trainers.text import reason, remedy
from ..host import folders, session
from ..schema import checked, valid
from ..sockets import EVALUATION_FOLDER, ReportSocket


class WriteReport(io.ComfyNode):
    """Writes REPORTs next to each other into files below the output folder, and returns them as images."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PersonalizeReport",
            display_name="Report",
            category=EVALUATION_FOLDER,
            description="Compares evaluations: an HTML page with all images, a table, a scatter plot, CSV and JSON.",
            search_aliases=["evaluation", "compare", "html", "csv", "json", "table", "scores"],
            is_output_node=True,
            inputs=[
                io.Autogrow.Input(
                    "reports",
                    template=io.Autogrow.TemplatePrefix(
                        ReportSocket.Input("report"), prefix="report", min=0, max=16
                    ),
                    tooltip="Reports of Evaluate or Score Images to compare, such as of several methods.",
                ),
                *file_inputs(),
                ReportSocket.Input(
                    "floor", optional=True,
                    tooltip="Report of the untrained model: the scores without training, lines in the scatter plot.",
                ),
                ceiling_input(),
            ],
            outputs=outputs(),
        )  # fmt: skip

    @classmethod
    def validate_inputs(cls, prefix: str | None = None, reports: dict | None = None) -> bool | str:
        """Check what is known before the graph runs, which may train for hours before it reaches this node.

        The host demands the name `reports` here.
        """
        return valid(check_prefix, prefix)

    @classmethod
    @checked
    def execute(cls, prefix, reports: dict | None = None, grid_rows=None, floor=None, ceiling=None) -> io.NodeOutput:
        compared = ordered([*(reports or {}).values()], floor, ceiling)
        if not compared:
            raise ValueError("There is no report to write: connect one of Evaluate or Score Images.")
        return written(compared, prefix, grid_rows, cls)


def file_inputs() -> list[io.Input]:
    """Return the widgets of the files."""
    return [
        io.String.Input(
            "prefix", default="personalize/reports", advanced=True,
            tooltip="Folder inside the output folder for these files; the labels name its subfolder.",
        ),
        io.Combo.Input(
            "grid_rows", options=[PROMPTS, REPORTS], default=PROMPTS, optional=True, advanced=True,
            tooltip="Rows of the grid: one per prompt, or one per report with a column for each prompt.",
        ),
    ]  # fmt: skip


def check_prefix(prefix: str) -> None:
    """Raise `ValueError` if the folder is not inside ComfyUI's output folder."""
    folders.inside_output(folder_of(prefix))


def ceiling_input() -> io.Input:
    """Return the socket of the best possible scores."""
    return ReportSocket.Input(
        "ceiling", optional=True,
        tooltip="Report of real images of the subject, such as of Score Images: the best possible scores.",
    )  # fmt: skip


def outputs() -> list[io.Output]:
    """Return the outputs of a comparison, see `written`."""
    return [
        io.Image.Output(display_name="table", tooltip="Mean and standard deviation of each score, a row per report."),
        io.Image.Output(display_name="grid", tooltip="All images, with their prompts."),
        io.String.Output(display_name="page", tooltip="HTML page with everything, below the output folder."),
        io.String.Output(display_name="csv", tooltip="Table of every image's scores, below the output folder."),
        io.String.Output(display_name="summary", tooltip="The scores and their models, report after report."),
        io.Image.Output(display_name="scatter", tooltip="Identity against text alignment, a point per report."),
    ]


def written(compared: list[Report], prefix: str, rows: str | None, cls) -> io.NodeOutput:
    """Write a comparison, and return the outputs and what the node `cls` shows.

    Raises:
        RuntimeError: a file cannot be written.
    """
    name = f"{folder_of(prefix)}/{csv_json.folder_name(compared)}"
    images = _write(Path(folders.inside_output(name)), compared, rows or PROMPTS)
    table, grid, scatter = (image[None] for image in images.values())
    summary = "\n\n".join(report.summary() for report in compared)
    shown = [file for image in (table, scatter, grid) for file in session.preview(image, cls)["images"]]
    texts = ui.PreviewText(f"{name}/report.html\n\n{summary}").as_dict()
    page, csv = (f"{name}/report.{kind}" for kind in ("html", "csv"))
    return io.NodeOutput(table, grid, page, csv, summary, scatter, ui={"images": shown} | texts)


def ordered(reports: list[Report | None], floor: Report | None, ceiling: Report | None) -> list[Report]:
    """Return the connected reports, the floor first and the ceiling last, both with their roles."""
    first = [] if floor is None else [replace(floor, role=FLOOR)]
    last = [] if ceiling is None else [replace(ceiling, role=CEILING)]
    return [*first, *(report for report in reports if report is not None), *last]


def _write(folder: Path, reports: list[Report], rows: str) -> dict[str, Tensor]:
    try:
        return report_folder.write(folder, reports, rows)
    except OSError as error:
        raise RuntimeError(
            f"The report cannot be written ({reason(error)}): {remedy(error)}, or choose another prefix."
        ) from error
