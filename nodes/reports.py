"""Report: one or several REPORTs as a table, a grid, files for other programs, and a page for people."""

from pathlib import Path

import numpy as np
import torch
from comfy_api.latest import io, ui
from PIL import Image

from ..trainers import report_files, report_page, report_pictures
from ..trainers.files import replaced
from ..trainers.prompt_list import folder_of
from ..trainers.report import Report
from ..trainers.sentences import reason
from . import host
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
                        ReportSocket.Input("report"), prefix="report", min=1, max=16
                    ),
                    tooltip="Of Evaluate or Score Images, such as the untrained model's and the trained one's.",
                ),
                io.String.Input(
                    "prefix", default="personalize/reports",
                    tooltip="Where the files go, in the output folder: into a folder named by the labels.",
                ),
            ],
            outputs=[
                io.Image.Output(display_name="table"),
                io.Image.Output(display_name="grid"),
                io.String.Output(display_name="page"),
                io.String.Output(display_name="csv"),
                io.String.Output(display_name="summary"),
            ],
        )  # fmt: skip

    @classmethod
    def validate_inputs(cls, prefix: str | None = None, reports: dict | None = None) -> bool | str:
        """What can be known before the graph runs: a training may stand before this node. The host names `reports`."""
        return valid(lambda given: host.inside_output(folder_of(given)), prefix)

    @classmethod
    @checked
    def execute(cls, prefix, reports: dict | None = None) -> io.NodeOutput:
        found = [report for report in (reports or {}).values() if report is not None]
        if not found:
            raise ValueError("There is no report to write: connect one of Evaluate or Score Images.")
        name = f"{folder_of(prefix)}/{report_files.folder_name(found)}"
        table, grid = report_pictures.table(found)[None], report_pictures.grid(found)[None]
        _write(Path(host.inside_output(name)), found, table[0], grid[0])
        summary = "\n\n".join(report.summary() for report in found)
        shown = ui.PreviewImage(table, cls=cls).as_dict() | ui.PreviewText(f"{name}/report.html\n\n{summary}").as_dict()
        return io.NodeOutput(table, grid, f"{name}/report.html", f"{name}/report.csv", summary, ui=shown)


def _write(folder: Path, reports: list[Report], table: torch.Tensor, grid: torch.Tensor) -> None:
    texts = {
        "report.csv": report_files.as_csv(reports),
        "report.json": report_files.as_json(reports),
        "report.html": report_page.page(reports),
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for file, text in texts.items():
            with replaced(folder / file) as beside:
                beside.write_text(text, encoding="utf-8", newline="\n")
        for file, picture in (("table.png", table), ("grid.png", grid)):
            with replaced(folder / file) as beside:
                Image.fromarray((picture.numpy() * 255).round().astype(np.uint8)).save(beside, "png")
    except OSError as error:
        raise RuntimeError(
            f"The report cannot be written ({reason(error)}): make room, or choose another prefix."
        ) from error
