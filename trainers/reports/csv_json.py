"""Reports as files for other programs: CSV and JSON of one or several, and a name for their folder."""

import csv
import hashlib
import io
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict

from ..evaluation.report import COLUMNS, DIVERSITY, NOT_MEASURED, Report, Spread

FIRST = ("report", "of", "prompt", "text", "seed")

Row = dict[str, str | int | float]


def folder_name(reports: list[Report]) -> str:
    """Return labels and a digest of everything: the same reports have the same folder."""
    words = re.sub(r"[\W_]+", "_", "_".join(report.label for report in reports))[:40].strip("_") or "report"
    return f"{words}_{hashlib.sha256(as_json(reports).encode()).hexdigest()[:8]}"


def as_csv(reports: list[Report]) -> str:
    """Return a row for each image, then each prompt's and each seed's means, then mean and standard deviation of all.

    Column `of` is the kind of row. Scores that were not measured are written "not measured".
    """
    rows = [{"report": report.title, **row} for report in reports for row in _rows(report)]
    return table([*FIRST, *COLUMNS], rows)


def table(columns: Sequence[str], rows: Iterable[Mapping[str, object]]) -> str:
    """Return rows as CSV with a heading, in which texts stay texts: no formula, and no end of a row within one.

    A spreadsheet computes what begins with `=`, `+`, `-` or `@`; behind an apostrophe it is shown.
    """
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows({name: _cell(value) for name, value in row.items()} for row in rows)
    return text.getvalue()


def _cell(value: object) -> object:
    if not isinstance(value, str):
        return value
    text = re.sub(r"\r\n?", "\n", value)
    return f"'{text}" if re.match(r"\s*[=+\-@]", text) else text


def _rows(report: Report) -> list[Row]:
    rows: list[Row] = []
    for each in report.images:
        row: Row = {"of": "image", "prompt": each.prompt, "text": each.text, "seed": each.seed}
        rows.append(row | {name: each.scores.get(name, _absent(report, name)) for name in COLUMNS})
    for prompt in report.prompts():
        rows.append({"of": "prompt", "prompt": prompt, **_means(report, prompt=prompt)})
    for seed in report.seeds():
        rows.append({"of": "seed", "seed": seed, **_means(report, seed=seed)})
    return [*rows, {"of": "mean", **_means(report)}, {"of": "standard deviation", **_means(report, part="std")}]


def _means(
    report: Report, part: str = "mean", prompt: str | None = None, seed: int | None = None
) -> dict[str, str | float]:
    found = {name: report.spread(name, prompt=prompt, seed=seed) for name in COLUMNS}
    return {name: getattr(each, part) if each else _absent(report, name) for name, each in found.items()}


def _absent(report: Report, column: str) -> str:
    """Return "" where a number does not apply, such as a single image's diversity, else "not measured"."""
    return NOT_MEASURED if report.spread(column) is None else ""


def as_json(reports: list[Report]) -> str:
    """Return everything but the images' pixels."""
    return json.dumps({"reports": [_as_dict(report) for report in reports]}, indent=1, ensure_ascii=False)


def _as_dict(report: Report) -> dict:
    return {
        "label": report.label,
        **({"role": report.role} if report.role else {}),
        "scores": _spreads(report),
        "metric_models": report.metric_models,
        NOT_MEASURED: report.missing,
        "settings": report.settings,
        "seconds per image": {"generation": report.generation_seconds, "scoring": report.scoring_seconds},
        "prompts": [{"prompt": prompt, "scores": _spreads(report, prompt=prompt)} for prompt in report.prompts()],
        "seeds": [{"seed": seed, "scores": _spreads(report, seed=seed)} for seed in report.seeds()],
        "images": [
            {"prompt": each.prompt, "text": each.text, "seed": each.seed, "scores": each.scores}
            for each in report.images
        ],
    }


def _spreads(report: Report, prompt: str | None = None, seed: int | None = None) -> dict[str, dict | None]:
    """Return spreads by column, `null` where nothing was measured; seeds have no diversity."""
    names = [name for name in COLUMNS if name != DIVERSITY or seed is None]
    found: dict[str, Spread | None] = {name: report.spread(name, prompt=prompt, seed=seed) for name in names}
    return {name: asdict(each) if each else None for name, each in found.items()}
