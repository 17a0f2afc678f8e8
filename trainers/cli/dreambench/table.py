"""Table over a data set's subjects: CSV, JSON, a page and lines of text. Data in, files out."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from html import escape
from pathlib import Path

from ...evaluation.report import COLUMNS, NOT_MEASURED, Spread
from ...evaluation.vqa import VQA
from ...files import replaced
from ...reports import csv_json
from ...reports.html import document
from .dataset import Subject

SCORES = (*COLUMNS, VQA)
EXPLAINED = (
    "Mean ± standard deviation over a subject's images, of diversity over its prompts; in the last line over the "
    "subjects' means."
)
DONE, FAILED, MISSING = "done", "failed", "missing"


@dataclass(frozen=True, kw_only=True)
class Row:
    """A subject's scores, or the reason why it has none."""

    subject: str
    class_word: str
    state: str
    why: str = ""
    scores: dict[str, Spread] = field(default_factory=dict)  # over its images; what was not measured is absent
    missing: dict[str, str] = field(default_factory=dict)  # column -> why it was not measured
    training_seconds: float = 0.0

    @classmethod
    def of(cls, subject: Subject, report: dict) -> "Row":
        """Return the row of a subject with this report.json."""
        scores = {name: Spread(**spread) for name, spread in report["scores"].items() if spread}
        vqa = Spread.of(each["scores"][VQA] for each in report["images"] if VQA in each["scores"])
        return cls(
            subject=subject.name, class_word=subject.class_word, state=DONE, missing=report[NOT_MEASURED],
            scores=scores | ({VQA: vqa} if vqa else {}), training_seconds=report["settings"]["training seconds"],
        )  # fmt: skip

    @classmethod
    def failed(cls, subject: Subject, sentence: str) -> "Row":
        return cls(subject=subject.name, class_word=subject.class_word, state=FAILED, why=sentence)

    @classmethod
    def not_yet(cls, subject: Subject) -> "Row":
        return cls(subject=subject.name, class_word=subject.class_word, state=MISSING, why="not finished")

    def mean(self, column: str) -> float | None:
        return self.scores[column].mean if column in self.scores else None


@dataclass(frozen=True)
class Table:
    """Rows of all subjects, and their means."""

    rows: Sequence[Row]

    def overall(self, column: str) -> Spread | None:
        """Return mean and standard deviation over subjects of each subject's mean."""
        return Spread.of(mean for row in self.rows if (mean := row.mean(column)) is not None)

    def notes(self) -> list[str]:
        """Return the reasons for missing scores and failures, each once."""
        found = [f"{name}, {NOT_MEASURED}: {why}" for row in self.rows for name, why in row.missing.items()]
        found += [f"{row.subject}, {row.state}: {row.why}" for row in self.rows if row.why]
        return [*dict.fromkeys(found)]

    def csv(self) -> str:
        """Return a row for each subject, then mean and standard deviation over subjects; `note` has missing scores."""
        rows: list[dict] = []
        for row in self.rows:
            note = row.why or "; ".join(f"{name}: {why}" for name, why in row.missing.items())
            rows.append(
                {"subject": row.subject, "class": row.class_word, "state": row.state, "note": note}
                | {name: "" if row.mean(name) is None else row.mean(name) for name in SCORES}
            )
        for title, part in (("mean", "mean"), ("standard deviation", "std")):
            found = {name: self.overall(name) for name in SCORES}
            cells = {name: getattr(spread, part) if spread else "" for name, spread in found.items()}
            rows.append({"subject": title, "state": self._count(), **cells})
        return csv_json.table(["subject", "class", "state", *SCORES, "note"], rows)

    def _count(self) -> str:
        return f"{sum(row.state == DONE for row in self.rows)} of {len(self.rows)} subjects"

    def json(self, settings: dict) -> str:
        found = {name: self.overall(name) for name in SCORES}
        content = {
            "settings": settings,
            "scores": {name: asdict(spread) if spread else None for name, spread in found.items()},
            "subjects": [asdict(row) for row in self.rows],
        }
        return json.dumps(content, indent=1, ensure_ascii=False)

    def cells(self) -> list[list[str]]:
        """Return the cells of a readable table: a heading, a line for each subject, and the mean."""
        lines = [["subject", "class", *SCORES, "training"]]
        for row in self.rows:
            seconds = f"{row.training_seconds:.0f} s" if row.state == DONE else row.state
            lines.append([row.subject, row.class_word, *(_cell(row.scores.get(name)) for name in SCORES), seconds])
        overall = [_cell(self.overall(name)) for name in SCORES]
        return [*lines, ["mean over subjects", self._count(), *overall, ""]]

    def text(self) -> str:
        lines = self.cells()
        widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
        padded = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip() for line in lines]
        return "\n".join([*padded, *self.notes()])

    def html(self, title: str) -> str:
        """Return a page without other files; each subject links to its own report. All text is escaped."""
        heading, *lines, overall = self.cells()
        body = [_html_row(heading, "th")]
        for row, line in zip(self.rows, lines, strict=True):
            name = escape(row.subject)
            first = f'<a href="{escape(row.subject, quote=True)}/report.html">{name}</a>' if row.state == DONE else name
            body.append(_html_row(line, "td", first))
        body.append(_html_row(overall, "td"))
        notes = "".join(f'<p class="note">{escape(note)}</p>' for note in [EXPLAINED, *self.notes()])
        table = f'<div class="card"><table>{"".join(body)}</table></div>'
        lead = f'<h1>{escape(title)}</h1><p class="lead">{self._count()}</p>'
        return document(escape(title), f"{lead}{table}{notes}")

    def write(self, folder: Path, settings: dict, title: str) -> None:
        """Write dreambench.csv, .json and .html."""
        folder.mkdir(parents=True, exist_ok=True)
        texts = {"csv": self.csv(), "json": self.json(settings), "html": self.html(title)}
        for ending, text in texts.items():
            with replaced(folder / f"dreambench.{ending}") as temporary:
                temporary.write_text(text, encoding="utf-8", newline="\n")


def _cell(spread: Spread | None) -> str:
    return f"{spread.mean:.3f} ± {spread.std:.3f}" if spread else "-"


def _html_row(cells: list[str], tag: str, first: str = "") -> str:
    """Return one row; `first` is HTML in the place of the first cell."""
    texts = [first or escape(cells[0]), *map(escape, cells[1:])]
    return "<tr>" + "".join(f"<{tag}>{text}</{tag}>" for text in texts) + "</tr>"
