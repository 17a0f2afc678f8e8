"""Panels of curves of a run's history. Numbers only; history_plot.py draws them."""

import math
from dataclasses import dataclass

from . import history as records
from .history import Points

LARGEST = 1e30  # larger values, NaN and infinity are not drawn


@dataclass(frozen=True)
class Curve:
    """One line of a panel."""

    label: str
    style: str
    points: list[Points]  # by stage
    hue: str = ""  # curves of one hue, such as values and their mean, share a colour

    def xy(self) -> tuple[list[float], list[float], list[int]]:
        """Return steps and values with a gap between stages, and the indices of points without a line."""
        x: list[float] = []
        y: list[float] = []
        lone: list[int] = []
        for points in self.points:
            shown = [(step, value) for step, value in points if abs(value) < LARGEST]
            lone += [len(x)] if len(shown) == 1 else []
            x += [*(step for step, _ in shown), math.nan]
            y += [*(value for _, value in shown), math.nan]
        return x[:-1], y[:-1], lone


@dataclass(frozen=True)
class Panel:
    """Curves below one heading, by run."""

    heading: str
    curves: list[list[Curve]]
    log: bool

    def hues(self) -> list[str]:
        return [*dict.fromkeys(curve.hue for curves in self.curves for curve in curves)]

    def legend(self) -> dict[str, Curve]:
        return {curve.label: curve for curves in self.curves for curve in curves}


def panels(histories: list[list[dict]], mean_of: int, log: bool) -> list[Panel]:
    """Return the panels for which at least one run has values."""
    mean = f"mean of {mean_of} steps"
    made = [
        ("Loss", log, [_loss(history, mean_of, mean) for history in histories]),
        ("Its terms, unweighted", True, [_terms(history, mean_of) for history in histories]),
        ("Loss on the fixed batch", log, [_fixed(history) for history in histories]),
        ("Variance ratio of that loss", False, [_ratio(history) for history in histories]),
        ("Loss on the fixed batch by timesteps", log, [_intervals(history) for history in histories]),
        ("CLIP score of generated images", False, [_score(history) for history in histories]),
        ("Identity of scored images", False, [_scored(history, "identity") for history in histories]),
        ("Text alignment of scored images", False, [_scored(history, "text") for history in histories]),
    ]
    return [Panel(heading, curves, scale) for heading, scale, curves in made if any(curves)]


def _loss(history: list[dict], mean_of: int, mean: str) -> list[Curve]:
    points = records.losses(history)
    means = [records.running_mean(each, mean_of) for each in points]
    return [Curve("each step", "thin", points), Curve(mean, "line", means)]


def _terms(history: list[dict], mean_of: int) -> list[Curve]:
    """Return the terms of the loss, if there are several."""
    names = [*dict.fromkeys(name for entry in history for name in entry["terms"])]
    curves = []
    for name in names if len(names) > 1 else ():
        points = [records.running_mean(each, mean_of) for each in records.terms(history, name)]
        curves.append(Curve(name.replace("_", " "), "line", points, name))
    return curves


def _fixed(history: list[dict]) -> list[Curve]:
    curves = _measured(history, "fixed_loss", "each evaluation", "thin")
    means = _measured(history, "smoothed", "mean of 10 evaluations", "line")
    return [*curves, *means] if means else _measured(history, "fixed_loss", "loss", "line")


def _ratio(history: list[dict]) -> list[Curve]:
    limits = _measured(history, "threshold", "stops below", "limit", also="ratio")
    return [*_measured(history, "ratio", "ratio", "line"), *limits]


def _intervals(history: list[dict]) -> list[Curve]:
    names = ("begin", "middle", "end")
    return [curve for name in names for curve in _measured(history, name, name, "line", hue=name)]


def _score(history: list[dict]) -> list[Curve]:
    """Return scores, the best so far, and the score that counts as an improvement."""
    curves = _measured(history, "score", "score", "evaluations")
    curves += _measured(history, "best", "best", "best", also="score")
    return curves + _measured(history, "threshold", "best + eps", "limit", also="score")


def _scored(history: list[dict], name: str) -> list[Curve]:
    return [*_measured(history, name, name, "evaluations"), *_measured(history, f"{name}_floor", "floor", "limit")]


def _measured(history: list[dict], name: str, label: str, style: str, *, hue="", also="") -> list[Curve]:
    """Return a curve for each monitor that measured `name` and, if given, `also`; limits reach to the stage's end."""
    known = [
        monitor for monitor in records.monitors(history, also or name) if monitor in records.monitors(history, name)
    ]
    curves = []
    for monitor in known:
        points = records.measures(history, monitor, name)
        if style in ("limit", "best"):
            points = [_to_the_end(*each) for each in zip(points, records.stages(history), strict=True)]
        which = f"{monitor}: " if len(known) > 1 else ""
        curves.append(Curve(which + label, style, points, which + hue))
    return curves


def _to_the_end(points: Points, stage: list[dict]) -> Points:
    return [*points, (stage[-1]["step"], points[-1][1])] if points else []
