"""Reports as files in a folder: a page, images, CSV and JSON. None is ever half written; the JSON comes last."""

import json
from pathlib import Path

from torch import Tensor

from ..evaluation.report import Report
from ..files import replaced, save_png
from ..images import to_pil
from . import csv_json, grid, html, scatter
from .grid import PROMPTS

JSON = "report.json"  # a folder that has it has the others


def write(folder: Path, reports: list[Report], rows: str = PROMPTS) -> dict[str, Tensor]:
    """Write table.png, grid.png, scatter.png, report.csv, report.html and report.json; return the images by name.

    Args:
        rows: rows of the grid, PROMPTS or REPORTS.

    Raises:
        OSError: a file cannot be written.
    """
    tensors = {
        "table": grid.table(reports),
        "grid": grid.grid(reports, rows),
        "scatter": scatter.image(reports),
    }
    images = {name: to_pil(tensor.movedim(-1, 0)) for name, tensor in tensors.items()}
    texts = {
        "report.csv": csv_json.as_csv(reports),
        "report.html": html.page(reports, images["scatter"] if len(reports) > 1 else None),
        JSON: csv_json.as_json(reports),
    }
    folder.mkdir(parents=True, exist_ok=True)
    for name, image in images.items():
        save_png(image, folder / f"{name}.png")
    for file, text in texts.items():
        with replaced(folder / file) as temporary:
            temporary.write_text(text, encoding="utf-8", newline="\n")
    return tensors


def read(folder: Path, digest: str) -> dict | None:
    """Read the one report of report.json, if it was made with the settings of this digest; else `None`."""
    try:
        (report,) = json.loads((folder / JSON).read_text(encoding="utf-8"))["reports"]
        return report if report["settings"]["digest"] == digest else None
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return None
