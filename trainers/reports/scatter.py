"""Draws reports as dots: how like the subject their pictures are, against how well they follow words.

The floor and the ceiling are lines, not dots. Labels move until none lies on another.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from ..evaluation.report import CEILING, CLIP_T, FLOOR, NOT_MEASURED, Report, Spread
from .figure import BIG, INK, PALE, ROW, SMALL, Line, Sheet, installed
from .history_plot import HUES

IDENTITY = ("DINO unseen", "DINO seen", "CLIP-I unseen", "CLIP-I seen")  # the first that all have is drawn
WIDTH, HEIGHT = 1024, 640  # of all, and of the panel with its heading, in pixels
LEFT, RIGHT, LONGEST = 84, 24, 250  # left and right of the panel; of a name
GUIDES = {FLOOR: "#6b7280", CEILING: "#b45309"}
# Where a label lies, seen from its dot: the first places are the best.
DIRECTIONS = [(math.cos(angle), math.sin(angle)) for angle in np.deg2rad([0, 180, 90, 270, *range(15, 360, 15)])]
SMALLEST_SPAN = 0.04  # of an axis: differences below it are noise, not distance


@dataclass(frozen=True)
class Point:
    """Of a report: the means, with deviations, of its identity and its CLIP-T."""

    name: str
    role: str
    identity: Spread
    text: Spread


def identity_column(reports: Sequence[Report]) -> str:
    """The first of IDENTITY that all reports have which can be shown; else the one that most of them have."""
    known = [report for report in reports if report.spread(CLIP_T)]
    return max(IDENTITY, key=lambda name: sum(report.spread(name) is not None for report in known))


def points(reports: Sequence[Report]) -> tuple[list[Point], list[str]]:
    """What can be drawn, and for each other report a sentence why not."""
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


def picture(reports: Sequence[Report]) -> Tensor:
    """`[H, 1024, 3]` in 0..1."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure(reports))
    canvas.draw()
    return torch.from_numpy(np.asarray(canvas.buffer_rgba())[..., :3] / np.float32(255))


def figure(reports: Sequence[Report]):
    """The `matplotlib.figure.Figure` of `picture`: dots, bars, lines and labels have the gid "dot", "bars", "label", or
    their role.
    """
    sheet, column = Sheet(WIDTH, HEIGHT), identity_column(reports)
    found, missing = points(reports)
    found = _named(sheet, found)
    dots, guides = [each for each in found if not each.role], [each for each in found if each.role]
    about = "A dot is the mean over a report's pictures, the bars are the standard error of that mean."
    header = [Line("Identity against text", BIG, weight="bold"), Line(about, colour=PALE)]
    sheet.begin(1, header, _footer(sheet, reports, column, missing), labels=1 if guides else 0)
    _axes(sheet, column, found, max((sheet.length(guide.name) for guide in guides), default=0))
    _guides(sheet, guides)
    _dots(sheet, dots)
    _labels(sheet, dots, guides)
    return sheet.figure


def _axes(sheet: Sheet, column: str, found: list[Point], room: float) -> None:
    """Names and limits, and room for names on the right."""
    axes, box = sheet.panels[0], sheet.panels[0].get_position()
    axes.set_position([LEFT / WIDTH, box.y0, 1 - (LEFT + RIGHT + room) / WIDTH, box.height])
    axes.set_xlabel(f"identity: {column}", fontsize=SMALL, color=INK)
    axes.set_ylabel(f"text: {CLIP_T}", fontsize=SMALL, color=INK)
    axes.set_xlim(*_limits([each.identity for each in found]))
    axes.set_ylim(*_limits([each.text for each in found]))


def _guides(sheet: Sheet, guides: list[Point]) -> None:
    for guide in guides:
        style = {"color": GUIDES[guide.role], "linewidth": 1.3, "linestyle": (0, (5, 3)), "gid": guide.role}
        sheet.panels[0].axvline(guide.identity.mean, **style)
        sheet.panels[0].axhline(guide.text.mean, **style)
    _guide_names(sheet, guides)


def _dots(sheet: Sheet, dots: list[Point]) -> None:
    axes = sheet.panels[0]
    for number, dot in enumerate(dots):
        place, colour = (dot.identity.mean, dot.text.mean), HUES[number % len(HUES)]
        axes.plot(*place, "o", color=colour, markersize=9, markeredgecolor="white", zorder=4, gid="dot")
        bars = axes.errorbar(*place, _error(dot.text), _error(dot.identity), ecolor=colour, elinewidth=1, fmt="none")
        for line in bars.lines[2]:
            line.set(alpha=0.55, gid="bars")


def _error(spread: Spread) -> float:
    """Standard error of the mean."""
    return spread.std / math.sqrt(spread.n)


def _limits(spreads: list[Spread]) -> tuple[float, float]:
    """Of an axis: all bars, and room for labels around them."""
    low = min((each.mean - _error(each) for each in spreads), default=0.0)
    high = max((each.mean + _error(each) for each in spreads), default=1.0)
    middle, span = (low + high) / 2, max(1.3 * (high - low), SMALLEST_SPAN)
    return middle - span / 2, middle + span / 2


def _footer(sheet: Sheet, reports: Sequence[Report], column: str, missing: list[str]) -> list[Line]:
    """Who measured, each once: reports of several judges cannot be compared. Then who is not shown."""
    metric_models = [
        f"{name}: {report.metric_models[name]}"
        for name in (column, CLIP_T)
        for report in reports
        if name in report.metric_models
    ]
    told = [*dict.fromkeys(metric_models), *missing]
    return [Line(line, colour=PALE) for sentence in told for line in sheet.wrapped(sentence)]


def _guide_names(sheet: Sheet, guides: list[Point]) -> None:
    """Above the panel and on its right, each at its line, moved apart where they would lie on each other."""
    above, right = sheet.panels[0].get_window_extent().y1, sheet.panels[0].get_window_extent().x1
    before: tuple[float, float] | None = None  # where the first name above the panel lies, from the left
    heights = [_pixel(sheet, guide)[1] for guide in guides]
    for guide, y in zip(guides, _apart(heights, ROW), strict=True):
        name, colour, half = guide.name, GUIDES[guide.role], sheet.length(guide.name) / 2
        x = min(max(_pixel(sheet, guide)[0], half + 8), WIDTH - half - 8)
        raised = before is not None and x - half < before[1] + 10 and x + half > before[0] - 10
        before = x - half, x + half
        sheet.write(name, x, sheet.height - above - 11 - ROW * raised, ha="center", color=colour, gid="name")
        sheet.write(name, right + 8, sheet.height - y, color=colour, gid="name")


def _apart(heights: list[float], distance: float) -> list[float]:
    """One or two heights, at least a distance from each other."""
    if len(heights) < 2 or abs(heights[0] - heights[1]) >= distance:
        return heights
    middle, sign = sum(heights) / 2, 1 if heights[0] >= heights[1] else -1
    return [middle + sign * distance / 2, middle - sign * distance / 2]


def _pixel(sheet: Sheet, point: Point) -> tuple[float, float]:
    """From the lower left corner."""
    return tuple(sheet.panels[0].transData.transform((point.identity.mean, point.text.mean)))


def _named(sheet: Sheet, found: list[Point]) -> list[Point]:
    """By names that have room; equal ones are counted."""
    names = [_fitting(sheet, each.name) for each in found]
    counted = [f"{name} ({names[: i + 1].count(name)})" for i, name in enumerate(names)]
    return [replace(each, name=counted[i] if names.count(names[i]) > 1 else names[i]) for i, each in enumerate(found)]


def _fitting(sheet: Sheet, text: str) -> str:
    """As much of it as has room."""
    short = text
    while sheet.length(short) > LONGEST:
        text = text[:-1]
        short = f"{text.rstrip()}..."
    return short


# ---------------------------------------------------------------------------------------------------------------------
# Labels of the dots. A box is left, bottom, right, top, in pixels.

Box = tuple[float, float, float, float]


def _labels(sheet: Sheet, dots: list[Point], guides: list[Point]) -> None:
    axes = sheet.panels[0]
    frame = tuple(axes.get_window_extent().extents)
    solid = [_around(_pixel(sheet, dot), 8, 8) for dot in dots]
    thin = [*_bars(sheet, dots), *_lines(sheet, guides, frame)]
    for dot in dots:
        place = _pixel(sheet, dot)
        half = sheet.length(dot.name) / 2 + 2, ROW / 2 - 1
        box, far = _free_place(place, half, frame, solid, thin)
        solid.append(box)
        middle = (box[0] + box[2]) / 2 - place[0], (box[1] + box[3]) / 2 - place[1]
        leader = {"arrowstyle": "-", "color": PALE, "linewidth": 0.7, "shrinkA": 1, "shrinkB": 5} if far else None
        axes.annotate(
            dot.name, (dot.identity.mean, dot.text.mean), middle, textcoords="offset pixels", ha="center", va="center",
            fontsize=SMALL, color=INK, zorder=5, arrowprops=leader, family=installed(), parse_math=False,
            gid="label",
        )  # fmt: skip


def _bars(sheet: Sheet, dots: list[Point]) -> list[Box]:
    found, transform = [], sheet.panels[0].transData.transform
    for dot in dots:
        x, y = _pixel(sheet, dot)
        error = _error(dot.identity), _error(dot.text)
        right, top = transform((dot.identity.mean + error[0], dot.text.mean + error[1]))
        found += [_around((x, y), right - x, 1), _around((x, y), 1, top - y)]
    return found


def _lines(sheet: Sheet, guides: list[Point], frame: Box) -> list[Box]:
    left, bottom, right, top = frame
    places = [_pixel(sheet, guide) for guide in guides]
    return [box for x, y in places for box in ((x - 1, bottom, x + 1, top), (left, y - 1, right, y + 1))]


def _around(place: tuple[float, float], width: float, height: float) -> Box:
    return place[0] - width, place[1] - height, place[0] + width, place[1] + height


def _free_place(
    place: tuple[float, float], half: tuple[float, float], frame: Box, solid: list[Box], thin: list[Box]
) -> tuple[Box, bool]:
    """The nearest box of a half width and height that lies on nothing, and whether it is far; in a crowd it may cross
    bars and lines, but never dots and labels.
    """
    for others, reach in ((solid + thin, 120), (solid, 1000)):
        for distance in range(10, reach, 6):
            for x, y in DIRECTIONS:
                middle = place[0] + x * (distance + half[0]), place[1] + y * (distance + half[1])
                box = _around(middle, *half)
                inside = all(box[i] >= frame[i] and box[i + 2] <= frame[i + 2] for i in (0, 1))
                if inside and not any(_overlap(box, other) for other in others):
                    return box, distance > 22
    return _around(place, *half), False


def _overlap(one: Box, other: Box) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]
