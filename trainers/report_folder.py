"""A report's files in a folder: a page, a table, CSV and JSON. Each is whole or not there; the JSON comes last."""

import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from . import report_files, report_page, report_pictures
from .files import replaced, save_png
from .report import Report

JSON = "report.json"  # a folder that has it has the others


def write(folder: Path, reports: list[Report]) -> None:
    """Raises OSError: it cannot be written."""
    folder.mkdir(parents=True, exist_ok=True)
    for file, make in (("table.png", report_pictures.table), ("grid.png", report_pictures.grid)):
        save_png(_picture(make(reports)), folder / file)
    makers = {"report.csv": report_files.as_csv, "report.html": report_page.page, JSON: report_files.as_json}
    for file, make in makers.items():
        with replaced(folder / file) as beside:
            beside.write_text(make(reports), encoding="utf-8", newline="\n")


def read(folder: Path, digest: str) -> dict | None:
    """What report.json tells of its one report, if that was made with the settings of this digest."""
    try:
        (told,) = json.loads((folder / JSON).read_text(encoding="utf-8"))["reports"]
        return told if told["settings"]["digest"] == digest else None
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return None


def _picture(tensor: torch.Tensor) -> Image.Image:
    return Image.fromarray((tensor.numpy() * 255).round().astype(np.uint8))
