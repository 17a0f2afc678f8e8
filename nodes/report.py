"""Report: one or several REPORTs as a table, a grid, files for other programs, and a page for people."""

from dataclasses import replace
from pathlib import Path

from comfy_api.latest import io, ui
from torch import Tensor

from ..trainers.evaluation.prompt_folders import folder_of
from ..trainers.evaluation.report import CEILING, FLOOR, Report
from ..trainers.reports import csv_json, report_folder
from ..trainers.reports.grid import PROMPTS, REPORTS
from ..trainers.text import reason
from .host import folders
from .schema import checked, valid
from .sockets import CATEGORY, ReportSocket


class WriteReport(io.ComfyNode):
    """REPORTs beside each other -> files below the output folder, and pictures."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PersonalizeReport",
            display_name="Report",
            category=CATEGORY,
            description="Writes what evaluations found, beside each other: a page with pictures, a table, CSV, JSON.",
            search_aliases=["evaluation", "compare", "html", "csv", "json", "table", "scores"],
            is_output_node=True,
            inputs=[
                io.Autogrow.Input(
                    "reports",
                    template=io.Autogrow.TemplatePrefix(
                        ReportSocket.Input("report"), prefix="report", min=0, max=16
                    ),
                    tooltip="Of Evaluate or Score Images, such as the untrained model's and the trained one's.",
                ),
                io.String.Input(
                    "prefix", default="personalize/reports",
                    tooltip="Where the files go, in the output folder: into a folder named by the labels.",
                ),
                io.Combo.Input(
                    "rows", options=[PROMPTS, REPORTS], default=PROMPTS, optional=True,
                    tooltip="What a row of the grid is: a prompt, or a report with a column for each prompt.",
                ),
                ReportSocket.Input(
                    "floor", optional=True,
                    tooltip="The untrained model's: what is reached without learning. A line in the scatter.",
                ),
                ReportSocket.Input(
                    "ceiling", optional=True,
                    tooltip="Of real pictures of the subject, such as Score Images gives: as good as it can get.",
                ),
            ],
            outputs=[
                io.Image.Output(display_name="table"),
                io.Image.Output(display_name="grid"),
                io.String.Output(display_name="page"),
                io.String.Output(display_name="csv"),
                io.String.Output(display_name="summary"),
                io.Image.Output(display_name="scatter"),
            ],
        )  # fmt: skip

    @classmethod
    def validate_inputs(cls, prefix: str | None = None, reports: dict | None = None) -> bool | str:
        """What can be known before the graph runs: a training may stand before this node. The host names `reports`."""
        return valid(lambda given: folders.inside_output(folder_of(given)), prefix)

    @classmethod
    @checked
    def execute(cls, prefix, reports: dict | None = None, rows=None, floor=None, ceiling=None) -> io.NodeOutput:
        found = ordered([*(reports or {}).values()], floor, ceiling)
        if not found:
            raise ValueError("There is no report to write: connect one of Evaluate or Score Images.")
        name = f"{folder_of(prefix)}/{csv_json.folder_name(found)}"
        pictures = _write(Path(folders.inside_output(name)), found, rows or PROMPTS)
        table, grid, scatter = (picture[None] for picture in pictures.values())
        summary = "\n\n".join(report.summary() for report in found)
        shown = ui.PreviewImage(table, cls=cls).as_dict() | ui.PreviewText(f"{name}/report.html\n\n{summary}").as_dict()
        return io.NodeOutput(table, grid, f"{name}/report.html", f"{name}/report.csv", summary, scatter, ui=shown)


def ordered(reports: list[Report | None], floor: Report | None, ceiling: Report | None) -> list[Report]:
    """Those that are connected: the floor first, the ceiling last, each knowing what it is."""
    first = [] if floor is None else [replace(floor, role=FLOOR)]
    last = [] if ceiling is None else [replace(ceiling, role=CEILING)]
    return [*first, *(report for report in reports if report is not None), *last]


def _write(folder: Path, reports: list[Report], rows: str) -> dict[str, Tensor]:
    try:
        return report_folder.write(folder, reports, rows)
    except OSError as error:
        raise RuntimeError(
            f"The report cannot be written ({reason(error)}): make room, or choose another prefix."
        ) from error
