"""Plot History: is what it draws, writes and says what the history holds?

Histories written by hand, whose every number is known, and once a training's own.
"""

import csv
import dataclasses
import io
import json
import re
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch

from personalize.tests.support import histories as made
from personalize.trainers.reports import history as told
from personalize.trainers.reports import history_export, history_plot
from personalize.trainers.stopping.dvar import DVAR

SIZE = {"width": 768, "panel_height": 200}
RUN = "0123456789abcdef"


def figure(*results, log=False, mean_of=3, **size):
    return history_plot.figure([*results], **SIZE | size, log=log, mean_of=mean_of)


def axes_of(drawn):
    """Panels by what their first curves are."""
    return {axes.lines[0].get_label(): axes for axes in drawn.axes}


def points(axes, label, run=0):
    """What a curve's line holds, without the gaps between stages."""
    (line,) = (line for line in axes.lines if line.get_label() == label and line.get_gid() == f"run {run}")
    return [(int(x), y) for x, y in line.get_xydata().tolist() if not np.isnan(x)]


def texts(drawn):
    return [text.get_text() for text in drawn.texts]


def stop_lines(axes):
    """Step -> whether its line is drawn through, and its colour."""
    lines = [line for line in axes.lines if (line.get_gid() or "").startswith("stop")]
    return {line.get_xdata()[0]: (line.get_linestyle() == "-", line.get_color()) for line in lines}


# -- what is drawn


def test_a_plain_history_is_its_loss_and_the_mean_of_it():
    """Runs of before there were monitors: no "measures", one term."""
    drawn = figure(made.result(made.plain(8)))
    (axes,) = drawn.axes
    assert points(axes, "each step") == [(n, 1 / n) for n in range(1, 9)]
    means = [np.mean([1 / k for k in range(max(1, n - 2), n + 1)]) for n in range(1, 9)]
    assert points(axes, "mean of 3 steps") == [(n, pytest.approx(m)) for n, m in zip(range(1, 9), means, strict=True)]
    assert (
        texts(drawn)[0] == "<dog>, TextBoost: 8 steps in 4 s"
        and texts(drawn)[1] == f"It ended: all steps done. Run {RUN}."
    )
    assert not stop_lines(axes)


def test_everything_that_monitors_measured_has_its_panel():
    drawn = figure(made.result(made.monitored(8)))
    panels = axes_of(drawn)
    assert [*panels] == ["each step", "denoising", "loss", "ratio", "begin", "score"]
    steps = range(9)
    assert points(panels["loss"], "loss") == [(n, 2 / (1 + n)) for n in steps]
    assert points(panels["ratio"], "ratio") == [(n, 1 / (1 + n)) for n in steps]
    assert {*points(panels["ratio"], "stops below")} == {(n, 0.15) for n in steps}
    assert points(panels["begin"], "middle") == [(0, 3.0), *((n, 2 / n) for n in steps[1:])]
    assert points(panels["score"], "score") == [(0, 0.5), (4, 0.54), (8, 0.58)]
    assert {*points(panels["score"], "best + eps")} == {(0, 0.62), (4, 0.62), (8, 0.62)}
    (limit,) = (line for line in panels["ratio"].lines if line.get_label() == "stops below")
    assert limit.get_linestyle() == "--" and limit.get_drawstyle() == "steps-post"
    preserved = points(panels["denoising"], "knowledge preservation")
    assert preserved[-1] == (8, pytest.approx((0.06 + 0.07 + 0.08) / 3))
    assert panels["denoising"].get_yscale() == "log"


def test_scores_to_pick_by_stand_over_their_floors():
    lines = made.plain(8)
    lines[0]["start"] = {"Pick by Score": {"identity_floor": 0.1, "text_floor": 0.2, "seconds": 1.0}}
    for line in lines[3::4]:
        found = {"identity": line["step"] / 10, "text": 1 - line["step"] / 10, "seconds": 1.0}
        line["measures"] = {"Pick by Score": found}
    result = dataclasses.replace(made.result(lines), picked=4)
    panels = axes_of(figure(result))
    assert points(panels["identity"], "identity") == [(4, 0.4), (8, 0.8)]
    assert points(panels["identity"], "floor") == [(0, 0.1), (8, 0.1)]
    assert points(panels["text"], "text") == [(4, 0.6), (8, pytest.approx(0.2))]
    assert points(panels["text"], "floor") == [(0, 0.2), (8, 0.2)]
    assert "Step 4: its state was picked, by score." in told.summary(result)
    assert len(stop_lines(panels["identity"])) == 1


def test_values_and_their_mean_where_a_monitor_has_both():
    lines = [line | {"measures": {"DVAR": made.dvar(line["step"], smoothed=0.5)}} for line in made.plain(4)]
    panels = axes_of(figure(made.result(lines)))
    assert points(panels["each evaluation"], "each evaluation") == [(n, 2 / (1 + n)) for n in range(1, 5)]
    assert points(panels["each evaluation"], "mean of 10 evaluations") == [(n, 0.5) for n in range(1, 5)]


def test_two_monitors_of_a_kind_are_told_apart():
    lines = made.plain(4)
    for line in lines:
        line["measures"] = {"DVAR": made.dvar(line["step"]), "DVAR 2": made.dvar(line["step"] + 1)}
    panel = figure(made.result(lines)).axes[-1]
    assert points(panel, "DVAR 2: ratio") == [(n, 1 / (2 + n)) for n in range(1, 5)]
    lines = [line for line in panel.lines if line.get_label().endswith("ratio")]
    assert len({line.get_color() for line in lines}) == 2


def test_stages_are_apart_named_and_each_has_its_own_mean():
    drawn = figure(made.result(made.staged()))
    axes = axes_of(drawn)
    (mean,) = (line for line in axes["each step"].lines if line.get_label() == "mean of 3 steps")
    assert np.isnan(mean.get_xdata()).nonzero()[0].tolist() == [4, 11]
    assert points(axes["each step"], "mean of 3 steps")[4] == (5, 1 / 5)  # not of the stage before
    assert [n for n, _ in points(axes["loss"], "loss")] == [*range(5), *range(4, 11), *range(10, 21)]
    bands = [patch for patch in axes["loss"].patches if patch.get_gid() == "stage"]
    assert [(band.get_x(), band.get_x() + band.get_width()) for band in bands] == [(4, 10)]
    assert {"attndreambooth 2", "attndreambooth 3"} <= {*texts(drawn)}


def test_a_stage_too_short_for_its_name_has_its_number():
    named = texts(figure(made.result(made.staged((("attndreambooth 1", 2), ("attndreambooth 2", 60))))))
    assert "1" in named and "attndreambooth 1" not in named and "attndreambooth 2" in named


def test_stops_that_acted_and_that_were_only_noted_look_different():
    stops = [made.stop(5, acted=False), made.stop(7, monitor="Fixed Steps", reason="at most 7 steps")]
    drawn = figure(made.result(made.monitored(8), stops=stops, stop_reason="Fixed Steps"))
    for axes in drawn.axes:
        assert stop_lines(axes) == {5: (False, history_plot.RECORDED), 7: (True, history_plot.ACTED)}
    said = " ".join(texts(drawn))
    assert "Step 5: DVAR would have stopped textboost (only recorded): the variance over the last 3 steps" in said
    assert "Step 7: Fixed Steps stopped textboost: at most 7 steps." in said
    boxes = [text for text in drawn.texts if text.get_text() in ("A", "B")]
    assert [text.get_bbox_patch().get_facecolor()[:3] == (1, 1, 1) for text in boxes] == [True, False] * 2


def test_letters_of_near_stops_do_not_lie_over_each_other():
    drawn = figure(made.result(made.plain(300), stops=[made.stop(150 + n) for n in range(4)]))
    width = drawn.bbox.width
    above = [text for text in drawn.texts if text.get_text() in "ABCD"][-4:]
    places = [text.get_position()[0] * width for text in above]
    assert np.diff(places).min() >= 18


def test_two_runs_lie_over_each_other_in_two_colours():
    first, second = made.result(made.monitored(8)), made.result(made.plain(12), stop_reason="another end")
    drawn = figure(first, second)
    panels = axes_of(drawn)
    assert points(panels["each step"], "each step", 1) == [(n, 1 / n) for n in range(1, 13)]
    assert points(panels["each step"], "each step", 0) == [(n, 1 / n) for n in range(1, 9)]
    colours = {line.get_gid(): line.get_color() for line in panels["each step"].lines}
    assert colours == {"run 0": history_plot.RUNS[0][0], "run 1": history_plot.RUNS[1][0]}
    assert {line.get_gid() for line in panels["ratio"].lines} == {"run 0"}
    assert panels["ratio"].get_xlim()[1] > 12
    assert texts(drawn).count(
        "<dog>, TextBoost: 12 steps in 6 s"
    ) == 1 and f"It ended: another end. Run {RUN}." in texts(drawn)
    spots = [text for text in drawn.texts if text.get_text() == "  "]
    assert [spot.get_bbox_patch().get_edgecolor() for spot in spots] == [
        tuple(int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)) + (1.0,) for colour in colours.values()
    ]


def test_one_step_is_a_dot():
    drawn = figure(made.result(made.plain(1)))
    assert points(drawn.axes[0], "mean of 3 steps") == [(1, 1.0)]
    assert all(line.get_marker() == "o" and line.get_markevery() == [0] for line in drawn.axes[0].lines)
    assert colourful(history_plot.image([made.result(made.plain(1))], **SIZE)) > 10


@pytest.mark.parametrize("losses", [(0.1, 0.2, 0.4), (0.0, 0.0, 0.0), (-1.0, 0.5, 1e-6), (1e20, 1.0, 1e-20)])
def test_losses_on_either_scale(losses):
    lines = [line | {"loss": loss} for line, loss in zip(made.plain(3), losses, strict=True)]
    drawn = figure(made.result(lines), log=True)
    assert drawn.axes[0].get_yscale() == ("log" if any(loss > 0 for loss in losses) else "linear")
    assert points(drawn.axes[0], "each step") == [*zip((1, 2, 3), losses, strict=True)]
    for log in (False, True):
        assert history_plot.image([made.result(lines)], **SIZE, log=log).isfinite().all()


def test_what_is_no_number_is_left_out():
    lines = made.monitored(4)
    lines[1]["measures"]["DVAR"]["ratio"] = float("nan")
    lines[2]["measures"]["DVAR"]["ratio"] = 1e300  # nor what no image can show
    panel = axes_of(figure(made.result(lines)))["ratio"]
    assert points(panel, "ratio") == [(0, 1.0), (1, 0.5), (4, 0.2)]


# -- the image


def colourful(picture):
    """Pixels that are neither white nor gray."""
    return int(((picture.amax(dim=-1) - picture.amin(dim=-1)) > 0.3).sum())


@pytest.mark.parametrize(("width", "height"), [(512, 160), (768, 240), (1001, 333), (1024, 1024), (4096, 640)])
def test_the_image_is_as_large_as_asked(width, height):
    picture = history_plot.image([made.result(made.staged(), stops=[made.stop()])], width=width, panel_height=height)
    assert picture.dtype == torch.float32 and picture.shape[0] == 1 and picture.shape[2:] == (width, 3)
    drawn = figure(made.result(made.staged(), stops=[made.stop()]), width=width, panel_height=height)
    assert 3 * height < picture.shape[1] == int(drawn.bbox.height)
    assert 0 <= picture.min() < 0.3 and picture.max() == 1 and colourful(picture) > 500


def overlaps(drawn):
    """Pairs of texts that lie over each other, and texts that leave the sheet."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(drawn)
    canvas.draw()
    shown = [text for text in drawn.texts if text.get_text().strip()]
    for axes in drawn.axes:
        shown += axes.get_legend().get_texts() + [t for t in axes.get_yticklabels() if _inside(t, axes)]
    boxes = [(text.get_text(), text.get_window_extent(canvas.get_renderer())) for text in shown]
    sheet = drawn.bbox
    found = [name for name, box in boxes if box.x0 < 0 or box.y0 < 0 or box.x1 > sheet.x1 or box.y1 > sheet.y1]
    pairs = [(a, b) for i, (a, one) in enumerate(boxes) for b, other in boxes[i + 1 :] if one.overlaps(other)]
    return found + pairs


def _inside(label, axes):
    low, high = sorted(axes.get_ylim())
    return low <= label.get_position()[1] <= high


LONG = "because " * 40 + "x" * 300


@pytest.mark.parametrize(("width", "log"), [(512, False), (768, True), (1024, False), (2048, True)])
def test_no_text_lies_over_another(width, log):
    """Two runs, three stages, many stops, long reasons and names."""
    stops = [made.stop(2 * n, acted=n % 2 == 0, reason=LONG if n == 3 else "settled") for n in range(1, 8)]
    staged = made.result(made.staged(), stops=stops, stop_reason=LONG, settings=settings("<" + "dog" * 40 + ">"))
    monitored = made.result(made.monitored(20), stops=[made.stop(19)])
    for results in ([monitored], [staged], [monitored, staged], [staged, staged]):
        assert overlaps(figure(*results, width=width, log=log)) == []


def settings(word="<dog>", method="TextBoost"):
    return {"method": method, "concept": {"placeholder_token": word}}


@pytest.mark.filterwarnings("ignore:Glyph")
@pytest.mark.parametrize("word", ["$\\x$", "<$>", "\\frac", "犬", "a\nb", "_{}", ""])
def test_names_are_only_signs(word):
    lines = [line | {"stage": word, "terms": {"$\\y$": 1.0, "z$": 2.0}} for line in made.plain(2)]
    result = made.result(lines, settings=settings(word), stop_reason=word, stops=[made.stop(1, reason=word)])
    assert colourful(history_plot.image([result, result], **SIZE)) > 500


def test_drawing_leaves_matplotlib_as_it_was():
    """No pyplot, nobody's settings; and it is not even imported with the pack."""
    code = """
import sys, types
sys.path.insert(0, {root!r})
pack = types.ModuleType("personalize"); pack.__path__ = [{root!r}]; sys.modules["personalize"] = pack
from personalize.trainers.reports import history, history_export, history_plot
assert not any(name.startswith(("matplotlib.", "tensorboard")) for name in sys.modules)
import matplotlib
from personalize.tests.support import histories as made
before = dict(dict.items(matplotlib.rcParams))  # asked in another way it chooses a backend
assert history_plot.image([made.result(made.monitored())]).shape[2] == 1024
assert "matplotlib.pyplot" not in sys.modules
assert dict(dict.items(matplotlib.rcParams)) == before
"""
    root = str(Path(__file__).parents[2])
    done = subprocess.run([sys.executable, "-c", code.format(root=root)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# -- files and sentences


def table(text):
    return [*csv.DictReader(io.StringIO(text))]


def test_the_table_is_the_history():
    history = made.monitored(8)
    rows = table(history_export.as_csv(told.entries(made.result(history))))
    names = ["step", "stage", "stage_step", "seconds", "loss", "terms/denoising", "terms/knowledge_preservation"]
    assert [*rows[0]][:7] == names and [*rows[0]][-1].startswith("start/")
    for row, line in zip(rows, history, strict=True):
        expected = {name: line[name] for name in ("step", "stage_step", "seconds", "loss")}
        expected |= {f"terms/{name}": value for name, value in line["terms"].items()}
        for prefix, measured in (("", line["measures"]), ("start/", line.get("start", {}))):
            for monitor, found in measured.items():
                expected |= {f"{prefix}{monitor}/{name}": value for name, value in found.items()}
        given = {name: float(value) for name, value in row.items() if name != "stage" and value}
        assert given == expected and row["stage"] == line["stage"]
    assert rows[1]["CLIP Early Stopping/score"] == "" and rows[3]["CLIP Early Stopping/score"] == "0.54"


def test_entries_without_monitors_give_their_own_columns():
    rows = table(history_export.as_csv(told.entries(made.result(made.plain(3)))))
    assert [row["stage_step"] for row in rows] == ["1", "2", "3"]
    assert [*rows[0]] == ["step", "stage", "stage_step", "seconds", "loss", "terms/denoising"]


def test_json_is_the_history_as_it_is():
    history = made.monitored(4)
    result = made.result(history, stops=[made.stop(2)])
    found = json.loads(history_export.as_json(result), parse_constant=pytest.fail)
    assert found["history"] == history and found["stops"] == result.stops and found["settings"] == result.settings
    assert (found["run"], found["seconds"], found["complete"]) == ("0123456789abcdef", 2.0, True)
    history[0]["measures"]["DVAR"]["ratio"] = float("nan")
    found = json.loads(history_export.as_json(result), parse_constant=pytest.fail)
    assert found["history"][0]["measures"]["DVAR"]["ratio"] is None


def test_the_summary_says_what_it_cost_and_why_it_ended():
    stops = [made.stop(8), made.stop(5, acted=False, monitor="CLIP Early Stopping", reason="no better for 3 checks")]
    result = made.result(made.monitored(8), stops=stops, stop_reason="textboost: DVAR, settled, after step 8")
    assert told.summary(result, mean_of=4).splitlines() == [
        "<dog>, TextBoost, run 0123456789abcdef",
        "8 steps in 4 s, 0.5 s each.",
        f"Loss: 1 at the first step, {(1 / 5 + 1 / 6 + 1 / 7 + 1 / 8) / 4:.4g} over the last 4 of its stage.",
        "DVAR: 9 evaluations, 0.09 s, 2.2% of the training; last fixed_loss 0.2222, ratio 0.1111, threshold 0.15, "
        "begin 0.375, middle 0.25, end 0.125.",
        "CLIP Early Stopping: 3 evaluations, 3 s, 75.0% of the training; last score 0.58, best 0.6, threshold 0.62.",
        "Step 5: CLIP Early Stopping would have stopped textboost (only recorded): no better for 3 checks.",
        "Step 8: DVAR stopped textboost: the variance over the last 3 steps is 0.140 of all, below 0.15.",
        "It ended: textboost: DVAR, settled, after step 8.",
    ]
    lines = told.summary(made.result(made.staged())).splitlines()
    assert lines[1:5] == [
        "20 steps in 10 s, 0.5 s each.",
        "  attndreambooth 1: 4 steps in 2 s, 0.5 s each.",
        "  attndreambooth 2: 6 steps in 3 s, 0.5 s each.",
        "  attndreambooth 3: 10 steps in 5 s, 0.5 s each.",
    ]
    assert [told.duration(s) for s in (0.0, 59.4, 60, 3599, 3661)] == ["0 s", "59.4 s", "1 min 0 s", "59 min 59 s",
                                                                       "1 h 1 min"]  # fmt: skip


def test_events_are_read_back_by_tensorboard(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    history = told.entries(made.result(made.monitored(8)))
    history_export.write_events(history, tmp_path / "history.tfevents", started=1000.0)
    read = EventAccumulator(str(tmp_path))
    read.Reload()
    rows = history_export.rows(history)
    columns = {name for row in rows for name in row} - {"step", "stage"}
    assert {*read.Tags()["scalars"]} == {name.removeprefix("start/") for name in columns}
    for name in columns - {name for name in columns if name.startswith("start/")}:
        expected = [(row["step"], 1000 + row["seconds"], row[name]) for row in rows if name in row]
        if f"start/{name}" in columns:
            expected = [(0, 1000.0, rows[0][f"start/{name}"]), *expected]
        found = [(event.step, event.wall_time, event.value) for event in read.Scalars(name)]
        assert found == [(step, when, pytest.approx(value, rel=1e-6)) for step, when, value in expected]
    assert [file.name for file in tmp_path.iterdir()] == ["history.tfevents"]


# -- what is wrong

GOOD = made.entry(1)
BAD = {
    "no step": {"loss": 1.0, "seconds": 1.0},
    "a word as loss": GOOD | {"loss": "0.1"},
    "a switch as loss": GOOD | {"loss": True},
    "a number too large": GOOD | {"loss": 10**400},
    "half a step": GOOD | {"step": 1.5},
    "step 0": GOOD | {"step": 0},
    "a list of terms": GOOD | {"terms": [1.0]},
    "words as terms": GOOD | {"terms": {"denoising": "x"}},
    "a number of measures": GOOD | {"measures": 5},
    "a list in measures": GOOD | {"measures": {"DVAR": [1.0]}},
    "nothing as start": GOOD | {"start": None},
    "no seconds": {name: value for name, value in GOOD.items() if name != "seconds"},
}


@pytest.mark.parametrize("name", BAD)
def test_a_damaged_history_gets_one_sentence(name):
    with pytest.raises(ValueError, match=r"^The history of this result cannot be read \(entry 1\): connect one of"):
        told.entries(made.result([BAD[name] | {}, made.entry(2)]) if "seconds" in BAD[name] else _raw(BAD[name]))


def _raw(line):
    return dataclasses.replace(made.result([]), history=[line])


def test_steps_only_go_up():
    with pytest.raises(ValueError, match=r"^The history of this result cannot be read \(entry 2\)"):
        told.entries(made.result([made.entry(2), made.entry(2)]))


def test_what_is_no_stop_is_not_drawn():
    odd = ["x", {}, {"step": "1"}, {"step": True}, {"step": 10**30}, {"step": 2}]
    drawn = figure(made.result(made.plain(3), stops=odd))
    assert [*stop_lines(drawn.axes[0])] == [2]


# -- on the host


@pytest.fixture
def output(tmp_path, monkeypatch):
    """The output folder of a host in this process."""
    import folder_paths

    for kind in ("output", "temp"):
        (tmp_path / kind).mkdir()
        monkeypatch.setattr(folder_paths, f"get_{kind}_directory", lambda kind=kind: str(tmp_path / kind))
    return tmp_path / "output"


def plot(result, **changes):
    from personalize.nodes.plot_history import PlotHistory

    values = {"scale": "linear", "running_mean": 3, "width": 768, "panel_height": 200, "prefix": "h/x"}
    return PlotHistory.execute(result=result, **values | {"save": False, "tensorboard": False} | changes)


@pytest.mark.comfy
def test_the_node_draws_writes_and_says(output):
    result = made.result(made.monitored(8))
    given = plot(result, save=True)
    picture, path, summary, losses = given.result
    assert torch.equal(picture, history_plot.image([result], **SIZE, mean_of=3))
    assert path == "h/x/0123456789abcdef/history.csv" and summary == told.summary(result, 3)
    assert (output / path).read_text() == history_export.as_csv(told.entries(result))
    assert json.loads((output / path).with_suffix(".json").read_text())["history"] == result.history
    assert sorted(file.name for file in (output / path).parent.iterdir()) == ["history.csv", "history.json"]
    assert losses == {"loss": [1 / n for n in range(1, 9)]}
    assert given.ui["text"] == (summary,) and len(given.ui["images"]) == 1
    both = plot(result, second_result=made.result(made.plain(12)), scale="log").result
    assert both[0].shape[1] > picture.shape[1] and both[1] == "" and both[2].count("It ended") == 2
    assert not torch.equal(plot(result, running_mean=1).result[0], picture)


@pytest.mark.comfy
def test_nothing_is_written_that_is_not_asked_for(output):
    assert plot(made.result(made.plain())).result[1] == "" and not [*output.iterdir()]


@pytest.mark.comfy
@pytest.mark.parametrize("name", ["../../away", "con%year%", "a b.c", "犬", "***", "x" * 90])
def test_a_files_name_is_a_folder_below_the_prefix(output, name):
    path = plot(made.result(made.plain(), folder=name), save=True).result[1]
    assert re.fullmatch(r"h/x/\w{1,48}/history\.csv", path) and (output / path).is_file()
    assert [*output.iterdir()] == [output / "h"]


@pytest.mark.comfy
def test_tensorboard_beside_the_table(output):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for _ in range(2):  # the second replaces the first
        assert plot(made.result(made.plain()), save=True, tensorboard=True).result[1]
    folder = output / "h" / "x" / "0123456789abcdef"
    assert sorted(file.name for file in folder.iterdir()) == ["history.csv", "history.json", "history.tfevents"]
    read = EventAccumulator(str(folder))
    read.Reload()
    assert [event.value for event in read.Scalars("loss")] == [pytest.approx(1 / n) for n in range(1, 9)]


@pytest.mark.comfy
def test_without_tensorboard_one_sentence_before_anything_runs(output, monkeypatch):
    from personalize.nodes.plot_history import PlotHistory

    monkeypatch.setattr(sys, "path", [])
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    monkeypatch.setattr(history_export.importlib.util, "find_spec", lambda name: None)
    said = PlotHistory.validate_inputs(prefix="x", tensorboard=True)
    assert said.startswith("TensorBoard is not installed: run `pip install tensorboard`")
    assert PlotHistory.validate_inputs(prefix="x", tensorboard=False) is True
    with pytest.raises(ValueError, match="^TensorBoard is not installed"):
        plot(made.result(made.plain()), tensorboard=True)


@pytest.mark.comfy
@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"prefix": "../x"}, "^The prefix '../x' cannot be a folder of the output folder: write names"),
        ({"prefix": "x/con"}, "^The prefix"),
        ({"prefix": "link", "save": True}, "is not inside ComfyUI's output folder"),
        ({"width": 100}, "^The value of width is 100: use 512 to 4096"),
        ({"panel_height": 5000}, "^The value of panel_height is 5000: use 160 to 1024"),
        ({"running_mean": 0}, "^The value of running_mean is 0: use 1 to 10000"),
        ({"scale": "square"}, "^The value of scale is 'square': choose one of linear, log"),
        ({"second_result": "mine"}, "^The input second_result received no PERSONALIZE_RESULT: connect one"),
        ({"result": None}, "^There is no training to plot: connect a result, or choose a run"),
        ({"run": "f" * 16}, "^There is no run 'ffffffffffffffff': choose one"),
        ({"result": made.result([])}, "^This result has no history to plot: connect one of Train or Load"),
        ({"second_result": made.result([])}, "^This result has no history to plot"),
        (
            {"prefix": "a_file", "save": True},
            r"^The history cannot be written \(.*\): [a-z A-Z]+, or choose another",
        ),
    ],
)
def test_what_cannot_be_plotted_gets_one_sentence(output, tmp_path, changes, sentence):
    (tmp_path / "away").mkdir()
    (output / "link").symlink_to(tmp_path / "away", target_is_directory=True)
    (output / "a_file").write_text("x")
    with pytest.raises((ValueError, RuntimeError), match=sentence):
        plot(**{"result": made.result(made.plain())} | changes)
    assert not [*(tmp_path / "away").iterdir()]


@pytest.mark.comfy
def test_cores_own_node_draws_the_loss_map(output):
    """Of a result, what Train LoRA gives it: drawn alike. The socket is the one that it takes."""
    from comfy_extras.nodes_train import LossGraphNode

    from personalize.nodes.plot_history import PlotHistory

    ours, theirs = PlotHistory.define_schema().outputs[3], LossGraphNode.define_schema().inputs[0]
    assert ours.get_io_type() == theirs.get_io_type() == "LOSS_MAP"

    class Node(LossGraphNode):
        hidden = types.SimpleNamespace(prompt=None, extra_pnginfo=None, unique_id="1")

    given = plot(made.result(made.plain(8))).result[3]
    drawn = Node.execute(loss=given, filename_prefix="x").ui
    assert drawn.as_dict()["images"]
    assert [type(loss) for loss in given["loss"]] == [float] * 8  # as loss.item() is


# -- a training's own history


def test_a_trainings_own_history(tmp_path):
    from personalize.tests.support import small
    from personalize.tests.trainers.recipes.test_recipes import FAST, concept
    from personalize.trainers.runs import train
    from personalize.trainers.runs.folder import RunFolder
    from personalize.trainers.runs.run import Run

    monitors = (DVAR(window=2, threshold=0.9, batch_size=2, intervals=True, stop_training=False),)
    run = Run(concept=concept(), recipe=FAST, stopper=monitors)
    result = train.train(run, small.models(), tmp_path)
    kept = RunFolder(tmp_path).result()
    lines = [json.loads(line) for line in (tmp_path / "steps.jsonl").read_text().splitlines()]
    for each in (result, kept):
        panels = axes_of(figure(each))
        assert [*panels] == ["each step", "denoising", "each evaluation", "ratio", "begin"]
        assert points(panels["each step"], "each step") == [(line["step"], line["loss"]) for line in lines]
        fixed = [lines[0]["start"]["DVAR"]["fixed_loss"], *(line["measures"]["DVAR"]["fixed_loss"] for line in lines)]
        assert points(panels["each evaluation"], "each evaluation") == [*enumerate(fixed)]
        assert [*stop_lines(panels["ratio"])] == [stop["step"] for stop in result.stops]
        assert "DVAR: 4 evaluations" in told.summary(each) and told.summary(each).endswith(f"{result.stop_reason}.")
    rows = table(history_export.as_csv(told.entries(kept)))
    assert [float(row["loss"]) for row in rows] == [line["loss"] for line in lines]
    assert [float(row["DVAR/ratio"]) for row in rows] == [line["measures"]["DVAR"]["ratio"] for line in lines]
    assert history_export.started(kept) == pytest.approx((tmp_path / "run.json").stat().st_mtime - kept.seconds)


@pytest.mark.comfy
def test_a_run_on_disk_is_plotted_without_a_connection(output):
    from personalize.tests.support import small
    from personalize.tests.trainers.recipes.test_recipes import FAST, concept
    from personalize.trainers.runs import train
    from personalize.trainers.runs.run import Run

    digest = "0" * 16
    result = train.train(Run(concept=concept(), recipe=FAST), small.models(), output / "personalize" / "runs" / digest)
    chosen, connected = (plot(**values).result for values in ({"result": None, "run": digest}, {"result": result}))
    assert torch.equal(chosen[0], connected[0]) and chosen[2] == connected[2]
