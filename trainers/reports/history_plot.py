"""Plot of a run's history, or of two over each other: a panel for each measurement; stages and stops in all."""

import math
import string
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..runs.result import RunResult
from . import history as records
from . import history_panels as curves
from .figure import BAND, BIG, HUES, INK, LEFT, PALE, RIGHT, ROW, SMALL, Line, Sheet, installed
from .history_panels import Panel

ACTED, RECORDED = "#d6263c", PALE
RUNS = (("#2563eb", "#1e3a8a", "#8ab4f8"), ("#ea6a0c", "#7c2d12", "#fbb06d"))  # of two runs, by run
NEUTRAL = ("#6b7280", "#111827", "#b8bec8")  # in the legends of two runs
STYLES: dict[str, dict] = {
    "thin": {"linewidth": 0.8, "alpha": 0.45},
    "line": {"linewidth": 1.9},
    "evaluations": {"linewidth": 1.5, "marker": "o", "markersize": 4.5},
    "limit": {"linewidth": 1.3, "linestyle": (0, (4, 2.5)), "drawstyle": "steps-post"},
    "best": {"linewidth": 1.4, "linestyle": (0, (1, 1.2)), "drawstyle": "steps-post"},
}
LONGEST_LABEL = 36


def image(
    results: list[RunResult], *, width: int = 1024, panel_height: int = 240, log: bool = False, mean_of: int = 25
) -> Tensor:
    """Render `figure` to `[1, H, width, 3]` in 0..1; the number of panels decides the height.

    Args:
        results: one run, or two over each other.
        panel_height: height of each panel in pixels.
        log: losses on a logarithmic scale.
        mean_of: steps of the running mean.

    Raises:
        ValueError: a run without a history, or with a damaged one.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    drawn = figure(results, width=width, panel_height=panel_height, log=log, mean_of=mean_of)
    canvas = FigureCanvasAgg(drawn)
    canvas.draw()
    return torch.from_numpy(np.asarray(canvas.buffer_rgba())[..., :3] / np.float32(255))[None]


def figure(results: list[RunResult], *, width: int, panel_height: int, log: bool, mean_of: int):
    """Return the `matplotlib.figure.Figure` that `image` renders, with the same arguments."""
    histories = [records.entries(result) for result in results]
    panels, stops = curves.panels(histories, mean_of, log), _stops(results)
    labelled = {number: history for number, history in enumerate(histories) if len(records.stages(history)) > 1}
    sheet = Sheet(width, panel_height)
    header, footer = _header(sheet, results, histories), _footer(sheet, stops)
    sheet.begin(len(panels), header, footer, labels=len(labelled) + bool(stops))
    last = max(history[-1]["step"] for history in histories)
    sheet.panels[0].set_xlim(-0.01 * last, 1.01 * last)
    for number, panel in enumerate(panels):
        _draw(sheet.panels[number], panel)
        _heading(sheet, number, panel, lift=ROW * (len(labelled) + bool(stops)) if number == 0 else 0)
        _boundaries(sheet.panels[number], histories)
        for each in stops:
            style = {"linewidth": 1.4} if each.acted else {"linewidth": 1.4, "linestyle": (0, (1, 1.5))}
            sheet.panels[number].axvline(each.step, color=each.colour, gid=f"stop {each.letter}", **style)
    for row, (number, history) in enumerate(labelled.items()):
        colour = PALE if len(results) == 1 else RUNS[number][0]
        _stage_names(sheet, history, colour, row + bool(stops))
    _badges(sheet, stops)
    return sheet.figure


@dataclass(frozen=True)
class Stop:
    """Where a monitor fired."""

    letter: str
    step: int
    acted: bool
    colour: str
    sentence: str


def _stops(results: list[RunResult]) -> list[Stop]:
    found: list[Stop] = []
    for number, result in enumerate(results):
        for each in records.stops(result):
            acted = bool(each.get("acted"))
            colour = RUNS[number][0] if len(results) > 1 else (ACTED if acted else RECORDED)
            letter = string.ascii_uppercase[len(found) % 26]
            found.append(Stop(letter, each["step"], acted, colour, records.stop(each)))
    return found


def _colours(panel: Panel) -> list[dict[str, str]]:
    """Return colours by run and hue; with two runs there is one more, the legend's."""
    palettes = [HUES] if len(panel.curves) == 1 else [*RUNS, NEUTRAL]
    return [{hue: palette[i % len(palette)] for i, hue in enumerate(panel.hues())} for palette in palettes]


def _draw(axes, panel: Panel) -> None:
    from matplotlib.ticker import LogLocator, MaxNLocator

    colours = _colours(panel)
    for run, drawn in enumerate(panel.curves):
        for curve in drawn:
            x, y, lone = curve.xy()
            marks: dict = {"marker": "o", "markersize": 4.5, "markevery": lone} if lone else {}
            style: dict = {**marks, **STYLES[curve.style]}
            axes.plot(x, y, color=colours[run][curve.hue], label=curve.label, gid=f"run {run}", **style)
    values = [value for line in axes.lines for value in line.get_ydata() if math.isfinite(value)]
    if panel.log and any(value > 0 for value in values):
        axes.set_yscale("log", nonpositive="mask")
        axes.yaxis.set_major_locator(LogLocator(subs=_subdivisions([value for value in values if value > 0])))
        axes.tick_params(which="minor", length=0, labelleft=False)
    else:
        axes.yaxis.set_major_locator(MaxNLocator(5))
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:.4g}")
    axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
    axes.margins(y=0.08)


def _subdivisions(values: list[float]) -> tuple[float, ...]:
    """Return the labelled parts of a decade: the fewer decades, the more labels in each."""
    decades = math.log10(max(values) / min(values))
    return (1.0, 2.0, 3.0, 4.0, 6.0, 8.0) if decades < 0.7 else (1.0, 2.0, 5.0) if decades < 2 else (1.0,)


def _heading(sheet: Sheet, number: int, panel: Panel, lift: int) -> None:
    """Write a panel's heading on the left and its legend on the right, above the panel."""
    y, axes = sheet.top(number) - sheet.scale * (lift + 14), sheet.panels[number]
    sheet.write(panel.heading, sheet.scale * LEFT, y, fontsize=SMALL + 0.5, weight="bold")
    keys = _keys(panel)
    taken = sheet.length(panel.heading, SMALL + 0.5, "bold")
    taken += sum(sheet.length(key.get_label()) + sheet.scale * 40 for key in keys)
    style: dict = {"handlelength": 1.5, "columnspacing": 1.2, "handletextpad": 0.5, "labelcolor": INK}
    style["prop"] = {"family": installed(), "size": SMALL}
    if taken < sheet.width - sheet.scale * (LEFT + RIGHT):
        corner = sheet.fraction(sheet.width - sheet.scale * RIGHT, y)
        style |= {"loc": "center right", "bbox_to_anchor": corner, "bbox_transform": sheet.figure.transFigure}
        legend = axes.legend(handles=keys, ncols=len(keys), frameon=False, borderpad=0, borderaxespad=0, **style)
    else:  # many, or with long names: among the curves
        legend = axes.legend(handles=keys, loc="upper right", framealpha=0.85, edgecolor="none", **style)
    for text in legend.get_texts():
        text.set_parse_math(False)


def _keys(panel: Panel) -> list:
    """Return lines for the legend."""
    from matplotlib.lines import Line2D

    colours, keys = _colours(panel)[-1], []
    for label, curve in panel.legend().items():
        style = {name: value for name, value in STYLES[curve.style].items() if name != "drawstyle"}
        keys.append(Line2D([], [], color=colours[curve.hue], label=_short(label), **style))
    return keys


def _short(label: str) -> str:
    return label if len(label) <= LONGEST_LABEL else f"{label[: LONGEST_LABEL - 3]}..."


def _boundaries(axes, histories: list[list[dict]]) -> None:
    """Shade every second stage of one run; of two runs, draw a line in the run's colour where a stage begins."""
    for run, history in enumerate(histories):
        for number, stage in enumerate(records.stages(history)):
            begin, end = stage[0]["step"] - 1, stage[-1]["step"]
            if len(histories) > 1 and number:
                axes.axvline(begin, color=RUNS[run][2], linewidth=1.0, linestyle=(0, (6, 3)), gid="stage")
            elif len(histories) == 1 and number % 2:
                axes.axvspan(begin, end, facecolor=BAND, linewidth=0, zorder=0, gid="stage")


def _stage_names(sheet: Sheet, history: list[dict], colour: str, row: int) -> None:
    """Write each stage's name above it: whole, or its last word, as far as there is room."""
    y = sheet.top(0) - sheet.scale * ROW * (row + 0.5)
    for stage in records.stages(history):
        begin, end = (_pixel(sheet, step) for step in (stage[0]["step"] - 1, stage[-1]["step"]))
        name = _short(stage[0]["stage"])
        fitting = [text for text in (name, name.rpartition(" ")[2]) if sheet.length(text) < end - begin]
        sheet.write(fitting[0] if fitting else "", (begin + end) / 2, y, ha="center", color=colour)


def _pixel(sheet: Sheet, step: float) -> float:
    low, high = sheet.panels[0].get_xlim()
    left, right = sheet.scale * LEFT, sheet.width - sheet.scale * RIGHT
    return left + (step - low) / (high - low) * (right - left)


def _badges(sheet: Sheet, stops: list[Stop]) -> None:
    """Draw letters at the upper ends of the stops' lines, moved apart where they would overlap."""
    before = 0.0
    for stop in sorted(stops, key=lambda each: each.step):
        before = max(_pixel(sheet, stop.step), before + sheet.scale * 19)
        sheet.badge(before, sheet.top(0) - sheet.scale * 0.5 * ROW, stop.letter, stop.colour, stop.acted)


def _header(sheet: Sheet, results: list[RunResult], histories: list[list[dict]]) -> list[Line]:
    """Return lines with the training, its duration and the reason of its end."""
    lines = []
    for number, (result, history) in enumerate(zip(results, histories, strict=True)):
        two = len(results) > 1
        lines += [Line("")] * bool(number)
        end = f"{records.ending(result)} Run {result.folder.name}."
        title = f"{records.title(result)}: {records.length(history, result.seconds)}"
        for row, text in enumerate(sheet.wrapped(title, two, BIG, "bold")):
            spot = ("  ", RUNS[number][0], True) if two and not row else None
            lines.append(Line(text, BIG, weight="bold", indented=two, badge=spot))
        lines += [Line(text, colour=PALE, indented=two) for text in sheet.wrapped(end, two)]
    return lines


def _footer(sheet: Sheet, stops: list[Stop]) -> list[Line]:
    lines = []
    for stop in stops:
        first, *more = sheet.wrapped(stop.sentence, indented=True)
        lines.append(Line(first, indented=True, badge=(stop.letter, stop.colour, stop.acted)))
        lines += [Line(text, indented=True) for text in more]
    return lines
