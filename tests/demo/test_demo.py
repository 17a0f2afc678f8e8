"""The demo's own parts: does it run the workflow once per prompt, follow the training, and report what it saw?

The evaluators and the server are stood in for; the demo as a whole runs in test_demo_run.py.
"""

import json
import os
import sys
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from personalize.demo import client, report, show
from personalize.trainers.data.concept import Concept
from personalize.trainers.recipes.textboost import TextBoost
from personalize.trainers.runs.run import Run

OVERRIDES = {
    "_what": "a comment",
    "PersonalizeTextBoost": {"preset.steps": 250},
    "PersonalizeTrain": {"seed": 0},
    "Trained: prompt": {"text": ["a <dog> here", "a <dog> there"]},
}


def test_a_list_of_prompts_becomes_one_run_each():
    first, second = show.one_by_one(OVERRIDES)
    assert first["Trained: prompt"] == {"text": "a <dog> here"} and second["Trained: prompt"] == {
        "text": "a <dog> there"
    }
    assert first["PersonalizeTextBoost"] == second["PersonalizeTextBoost"] == {"preset.steps": 250}
    assert "_what" not in first


def test_the_command_line_wins_over_the_file():
    copy = json.loads(json.dumps(OVERRIDES))
    changed = show.with_options(copy, SimpleNamespace(steps=7, seed=3))
    assert changed["PersonalizeTextBoost"]["preset.steps"] == 7 and changed["PersonalizeTrain"]["seed"] == 3
    kept = show.with_options(json.loads(json.dumps(OVERRIDES)), SimpleNamespace(steps=None, seed=None))
    assert kept == OVERRIDES


def test_progress_follows_the_log_of_the_running_training(tmp_path, capsys):
    old = tmp_path / "old" / "steps.jsonl"
    old.parent.mkdir()
    old.write_text('{"step": 9, "steps": 9, "loss": 1, "seconds": 90}\n')
    os.utime(old, (1, 1))
    progress = show.Progress(tmp_path)
    progress.show()
    assert capsys.readouterr().out == ""
    log = tmp_path / "new" / "steps.jsonl"
    log.parent.mkdir()
    lines = [json.dumps({"step": n, "steps": 20, "loss": 0.5, "seconds": n / 2}) + "\n" for n in range(1, 21)]
    log.write_text("".join(lines[:4]) + lines[4][:9])
    progress.show()
    assert [line.split()[1] for line in capsys.readouterr().out.splitlines()] == ["1/20", "2/20", "4/20"]
    log.write_text("".join(lines))
    progress.show()
    assert capsys.readouterr().out.splitlines()[0].startswith("    step 6/20  loss 0.5000  3 s")
    assert progress.result(seed=0, steps=20) == {"steps": 20, "train_seconds": 10.0}


def test_a_training_that_was_used_again_is_found_by_its_inputs(tmp_path):
    for name, seed, complete in (("a", 0, True), ("b", 1, True), ("c", 0, False)):
        (tmp_path / name).mkdir()
        run = Run(concept=Concept(images=(torch.zeros(3, 8, 8),)), recipe=TextBoost(steps=2), seed=seed)
        stored = {"settings": run.settings(), "complete": complete, "seconds": 3.5 + seed}  # as RunFolder writes it
        (tmp_path / name / "run.json").write_text(json.dumps(stored))
    progress = show.Progress(tmp_path)
    assert progress.result(seed=1, steps=2) == {"steps": 2, "train_seconds": 4.5}
    assert progress.result(seed=0, steps=2) == {"steps": 2, "train_seconds": 3.5}
    with pytest.raises(client.HostError, match="No training"):
        progress.result(seed=0, steps=3)


JOB = {
    "instance": 2_000_034,
    "class_word": "dog",
    "prompts": ["a photo of a {} on the beach", "a painting of a {} in the snow"],
    "placeholder": "<concept>",
    "steps": 20,
    "train_seconds": 12.34,
    "device": "cpu",
}


def plain(colour, size=128):
    return Image.new("RGB", (size, size), colour)


class ScorerConfig:
    """Identity is the red channel, text alignment whether the green channel matches the prompt's length."""

    def __init__(self):
        self.prompts = []

    def identity(self, images, references):
        return [image.getpixel((0, 0))[0] / 255 for image in images]

    def clip_text(self, images, prompts):
        self.prompts += prompts
        return [image.getpixel((0, 0))[1] / 255 for image in images]


def pictures():
    return {
        "untrained": [[plain((51, 255, 0))] * 2] * 2,
        "trained": [[plain((102, 0, 0)), plain((204, 255, 0))], [plain((153, 0, 0))] * 2],
        "words": [[plain((255, 0, 0))] * 2] * 2,
    }


def test_the_report_holds_means_over_prompts_and_seeds():
    metric_models = ScorerConfig()
    result = report.score(JOB, pictures(), plain((0, 0, 0)), metric_models)
    ceiling = result.pop("identity_ceiling")
    assert result == {
        "identity_floor": 0.2,
        "identity": 0.6,
        "identity_oracle": 1.0,
        "text_floor": 1.0,
        "text": 0.25,
        "train_seconds": 12.3,
        "steps": 20,
        "device": "cpu",
    }
    assert 0 < ceiling < 1
    # The metric models know no placeholder: they are asked with the class word.
    assert set(metric_models.prompts) == {"a photo of a dog on the beach", "a painting of a dog in the snow"}


def test_the_ceiling_is_drawn_in_the_scenes_that_the_prompts_name():
    scenes = [report.scene_of(prompt) for prompt in JOB["prompts"]]
    assert [(s.background, s.style) for s in scenes] == [("on the beach", "photo"), ("in the snow", "painting")]
    drawn = report.drawings(JOB)
    assert [len(row) for row in drawn] == [report.DRAWINGS] * 2 and drawn[0][0].size == (128, 128)


def test_the_reference_is_the_same_at_every_run_and_described_without_its_article(tmp_path):
    words = [report.reference(tmp_path / name, 2_000_034, "dog") for name in ("a.png", "b.png")]
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    assert words == ["blue dotted dog"] * 2


def test_the_grid_shows_every_image_and_its_prompt():
    names = ("identity_floor", "identity", "identity_oracle", "identity_ceiling", "text_floor", "text")
    sheet = report.grid(JOB, pictures(), plain((1, 2, 3)), dict.fromkeys(names, 0.5))
    colours = {colour: count for count, colour in sheet.getcolors(1 << 20)}
    assert colours[(1, 2, 3)] == 256 * 256, "the reference"
    assert colours[(51, 255, 0)] == 4 * 128 * 128 and colours[(204, 255, 0)] == 128 * 128
    assert sheet.width < 1000


def test_long_prompts_are_wrapped_to_the_width_of_their_images():
    from PIL import ImageDraw, ImageFont

    pen, font = ImageDraw.Draw(plain("white")), ImageFont.load_default(13)
    lines = report.wrapped(pen, "a photo of a <concept> on a wooden floor far away", font, 120).split("\n")
    assert len(lines) > 1 and all(pen.textlength(line, font) <= 120 for line in lines)


def test_a_child_that_fails_is_named_with_its_last_words(tmp_path):
    (tmp_path / "bad.py").write_text("raise ValueError('no weights')")
    with pytest.raises(client.HostError, match="bad.py failed: ValueError: no weights"):
        show.child([sys.executable, tmp_path / "bad.py", "x"], tmp_path)
