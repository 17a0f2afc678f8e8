"""Plot of reports as dots, identity (subject fidelity) against text alignment; the floor and the ceiling are lines."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from ..evaluation.report import CEILING, CLIP_T, FLOOR, NOT_MEASURED, Report, Spread
from .figure import BIG, HUES, INK, PALE, SMALL, Line, Sheet, installed

IDENTITY = ("DINO unseen", "DINO seen", "CLIP-I unseen", "CLIP-I seen")  # the first that all have is plotted
WIDTH, HEIGHT = 1024, 640  # of all, and of the panel with its heading, in pixels
LEFT, RIGHT, LONGEST = 84, 24, 250  # left and right of the panel; of a name
LEGEND = 56  # next to the names in the legend: signs and gaps
MARKERS = "os^D"  # another one when the colours begin again
GUIDES = {FLOOR: PALE, CEILING: HUES[4]}
SMALLEST_SPAN = 0.04  # of an axis: differences below it are noise, not distance


@dataclass(frozen=True)
class Point:
    """Means, with deviations, of a report's identity and CLIP-T."""

    name: str
    role: str
    identity: Spread
    text: Spread


def identity_column(reports: Sequence[Report]) -> str:
    """Return the first of IDENTITY that all reports with CLIP-T have; else the one that most of them have."""
    known = [report for report in reports if report.spread(CLIP_T)]
    return max(IDENTITY, key=lambda name: sum(report.spread(name) is not None for report in known))


def points(reports: Sequence[Report]) -> tuple[list[Point], list[str]]:
    """Return the points that can be plotted, and for each other report a sentence why not."""
    column, found, missing = identity_column(reports), [], []
    for report in reports:
        identity, text = report.spread(column), report.spread(CLIP_T)
        if identity and text:
            found.append(Point(report.title, report.role, identity, text))
        else:
            lacking = CLIP_T if text is None else column
            why = report.missing.get(lacking, "").rstrip(".")
            missing.append(f"Not shown: {report.title}; {lacking} was {NOT_MEASURED}{f' ({why})' if why else ''}.")
    return found, missing


def image(reports: Sequence[Report]) -> Tensor:
    """Render `figure` to `[H, 1024, 3]` in 0..1."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure(reports))
    canvas.draw()
    return torch.from_numpy(np.asarray(canvas.buffer_rgba())[..., :3] / np.float32(255))


def figure(reports: Sequence[Report]):
    """Return the `matplotlib.figure.Figure`; its artists have the gid "dot", "bars" or, as lines, their role."""
    sheet, column = Sheet(WIDTH, HEIGHT), identity_column(reports)
    found, missing = points(reports)
    found = _named(sheet, found)
    caption = "A dot is the mean over a report's images, the bars are the standard error of that mean."
    header = [Line("Identity against text alignment", BIG, weight="bold"), Line(caption, colour=PALE)]
    sheet.begin(1, header, _footer(sheet, reports, column, missing), labels=0)
    _axes(sheet, column, found)
    handles = [_guide(sheet, each) for each in found if each.role]
    handles += [_dot(sheet, each, number) for number, each in enumerate(each for each in found if not each.role)]
    _legend(sheet, handles)
    return sheet.figure


def _axes(sheet: Sheet, column: str, found: list[Point]) -> None:
    """Set labels and limits, and leave room for the legend on the right."""
    axes, box = sheet.panels[0], sheet.panels[0].get_position()
    room = max((sheet.length(each.name) for each in found), default=0) + LEGEND
    axes.set_position((LEFT / WIDTH, box.y0, 1 - (LEFT + RIGHT + room) / WIDTH, box.height))
    axes.set_xlabel(f"identity: {column}", fontsize=SMALL, color=INK)
    axes.set_ylabel(f"text alignment: {CLIP_T}", fontsize=SMALL, color=INK)
    axes.set_xlim(*_limits([each.identity for each in found]))
    axes.set_ylim(*_limits([each.text for each in found]))


def _guide(sheet: Sheet, guide: Point):
    """Draw the floor or the ceiling as a line on both axes; return the legend's handle."""
    style: dict = {"color": GUIDES[guide.role], "linewidth": 1.3, "linestyle": (0, (5, 3)), "gid": guide.role}
    handle = sheet.panels[0].axvline(guide.identity.mean, label=guide.name, **style)
    sheet.panels[0].axhline(guide.text.mean, **style)
    return handle


def _dot(sheet: Sheet, dot: Point, number: int):
    """Draw a dot with its bars; return the legend's handle."""
    axes, place, colour = sheet.panels[0], (dot.identity.mean, dot.text.mean), HUES[number % len(HUES)]
    bars = axes.errorbar(*place, _error(dot.text), _error(dot.identity), ecolor=colour, elinewidth=1, fmt="none")
    for line in bars.lines[2]:
        line.set(alpha=0.55, gid="bars")
    style: dict = {"color": colour, "markersize": 9, "markeredgecolor": "white", "zorder": 4, "gid": "dot"}
    (handle,) = axes.plot(*place, MARKERS[number // len(HUES) % len(MARKERS)], label=dot.name, **style)
    return handle


def _legend(sheet: Sheet, handles: list) -> None:
    if not handles:
        return
    legend = sheet.panels[0].legend(
        handles=handles, loc="upper left", bbox_to_anchor=(1.01, 1.0), borderaxespad=0, frameon=False,
        prop={"family": installed(), "size": SMALL}, labelcolor=INK,
    )  # fmt: skip
    for text in legend.get_texts():
        text.set_parse_math(False)  # a label is a user's text, not a formula


def _error(spread: Spread) -> float:
    """Standard error of the mean."""
    return spread.std / math.sqrt(spread.n)


def _limits(spreads: list[Spread]) -> tuple[float, float]:
    """Return limits of an axis: all bars, and room around them."""
    low = min((each.mean - _error(each) for each in spreads), default=0.0)
    high = max((each.mean + _error(each) for each in spreads), default=1.0)
    middle, span = (low + high) / 2, max(1.3 * (high - low), SMALLEST_SPAN)
    return middle - span / 2, middle + span / 2


def _footer(sheet: Sheet, reports: Sequence[Report], column: str, missing: list[str]) -> list[Line]:
    """Return lines that name the metric models, since reports of several cannot be compared, and missing reports."""
    metric_models = [
        f"{name}: {report.metric_models[name]}"
        for name in (column, CLIP_T)
        for report in reports
        if name in report.metric_models
    ]
    told = [*dict.fromkeys(metric_models), *missing]
    return [Line(line, colour=PALE) for sentence in told for line in sheet.wrapped(sentence)]


def _named(sheet: Sheet, found: list[Point]) -> list[Point]:
    """Shorten names to the room that they have, and number equal ones."""
    names = [_fitting(sheet, each.name) for each in found]
    counted = [f"{name} ({names[: i + 1].count(name)})" for i, name in enumerate(names)]
    return [replace(each, name=counted[i] if names.count(names[i]) > 1 else names[i]) for i, each in enumerate(found)]


def _fitting(sheet: Sheet, text: str) -> str:
    """Shorten a text to the room it has."""
    short = text
    while sheet.length(short) > LONGEST:
        text = text[:-1]
        short = f"{text.rstrip()}..."
    return short
