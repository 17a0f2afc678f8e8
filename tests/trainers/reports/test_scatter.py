"""The scatter of reports: does each dot lie at its means, do floor and ceiling, and can every name be read?"""

import math
import statistics

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from PIL import Image

from personalize.trainers.evaluation.report import CEILING, FLOOR, Report, Scored
from personalize.trainers.reports import scatter

ALL = ("CLIP-T", "CLIP-I seen", "CLIP-I unseen", "DINO seen", "DINO unseen")


def report(label, start, columns=ALL, role="", **missing):
    """Four images; column number i scores start + i / 10 and three values around it."""
    image, steps = Image.new("RGB", (8, 8)), (0.0, 0.01, 0.03, 0.08)
    scores = [{name: start + ALL.index(name) / 10 + step for name in columns} for step in steps]
    pictures = tuple(Scored(prompt="a", text="a", seed=i, image=image, scores=each) for i, each in enumerate(scores))
    return Report(label=label, images=pictures, role=role, missing=missing)


def artists(figure, gid):
    return [each for each in figure.axes[0].get_children() if each.get_gid() == gid]  # without the legend's copies


def legend_of(figure):
    return [text.get_text() for text in figure.axes[0].get_legend().get_texts()]


def test_dots_lie_at_the_means_and_bars_are_the_standard_error():
    reports = [report("one", 0.1), report("two", 0.3)]
    figure = scatter.figure(reports)
    dots, bars = artists(figure, "dot"), artists(figure, "bars")
    for number, start in enumerate((0.1, 0.3)):
        mean = start + 0.03
        error = statistics.stdev((0.0, 0.01, 0.03, 0.08)) / math.sqrt(4)
        assert [*dots[number].get_xydata()[0]] == pytest.approx([mean + 0.4, mean])  # DINO unseen, CLIP-T
        (flat,), (upright,) = (each.get_segments() for each in bars[2 * number : 2 * number + 2])
        assert flat[:, 0].tolist() == pytest.approx([mean + 0.4 - error, mean + 0.4 + error])
        assert upright[:, 1].tolist() == pytest.approx([mean - error, mean + error])
    assert len(dots) == 2 and len(bars) == 4
    (axes,) = figure.axes
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("identity: DINO unseen", "text alignment: CLIP-T")
    assert scatter.image(reports).shape[1:] == (1024, 3)


@pytest.mark.parametrize(
    ("lacking", "column"),
    [((), "DINO unseen"), (("DINO unseen",), "DINO seen"), (("DINO unseen", "DINO seen"), "CLIP-I unseen"),
     (("DINO unseen", "DINO seen", "CLIP-I unseen"), "CLIP-I seen")],
)  # fmt: skip
def test_the_identity_is_the_first_score_that_all_have(lacking, column):
    fewer = report("fewer", 0.1, tuple(name for name in ALL if name not in lacking))
    assert scatter.identity_column([report("all", 0.2), fewer]) == column


def test_floor_and_ceiling_are_lines_on_both_axes():
    figure = scatter.figure([report("base", 0.1, role=FLOOR), report("m", 0.2), report("real", 0.4, role=CEILING)])
    for role, start in ((FLOOR, 0.1), (CEILING, 0.4)):
        upright, flat = artists(figure, role)
        assert [*upright.get_xdata()] == pytest.approx([start + 0.43] * 2)
        assert [*flat.get_ydata()] == pytest.approx([start + 0.03] * 2)
    assert len(artists(figure, "dot")) == 1
    assert legend_of(figure) == ["base (floor)", "real (ceiling)", "m"]


def test_a_report_without_the_scores_is_named_and_not_shown():
    text = {"CLIP-T": "No text was given."}
    others = [report("no words", 0.1, ("DINO unseen",), **text), report("no subject", 0.1, ("CLIP-T",))]
    found, missing = scatter.points([report("one", 0.1), *others])
    assert [each.name for each in found] == ["one"]
    assert missing == [
        "Not shown: no words; CLIP-T was not measured (No text was given).",
        "Not shown: no subject; DINO unseen was not measured.",
    ]
    shown = [each.get_text() for each in scatter.figure([report("one", 0.1), *others]).texts]
    assert [each for each in shown if each.startswith("Not shown")] == missing
    assert scatter.image(others).shape[2] == 3  # nothing to draw at all


@pytest.mark.parametrize("count", [1, 2, 16])
def test_every_dot_has_a_name_of_its_own_that_lies_on_the_sheet(count):
    """Equal places, equal labels that are long and would be a formula in matplotlib."""
    guides = [report("base $x$" * 20, 0.1, role=FLOOR), report("real " * 40, 0.101, role=CEILING)]
    figure = scatter.figure([*guides, *(report("a label without end $x_2$ " * 5, 0.1) for _ in range(count))])
    names = legend_of(figure)
    assert len({*names}) == count + 2
    assert all(name.startswith("a label without end $x_2$") for name in names[2:])
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    (axes,) = figure.axes
    box = axes.get_legend().get_window_extent(canvas.get_renderer())
    assert axes.get_window_extent().x1 <= box.x0 and box.x1 <= 1024 and box.y0 >= 0 and box.y1 <= figure.bbox.height
    looks = {(dot.get_color(), dot.get_marker()) for dot in artists(figure, "dot")}
    assert len(looks) == count
