"""The nodes of the three customisation methods on a real server, from Load References to saved files."""

import json

import pytest
from PIL import Image

from personalize.tests.support import prompts

pytestmark = [pytest.mark.slow, pytest.mark.comfy]
SMALL = {"preset": "short", "preset.steps": 2, "preset.views": 2}
DRAWN = {"preset.class_images": 2, "preset.class_image_steps": 1}


def graph(server, object_info, node, references=None, **changes):
    """The smallest prompt with this node for its recipe; the widgets show what the preset "short" holds."""
    prompt = prompts.smallest(object_info, server.checkpoint)
    prompt["recipe"] = {"class_type": f"Personalize{node}", "inputs": {**SMALL, **changes}}
    prompt["references"]["inputs"] |= {"class_word": "dog", **(references or {})}
    return prompt


def newest_run(server):
    runs = (server.base / "output" / "personalize" / "runs").glob("*/run.json")
    return json.loads(max(runs, key=lambda file: file.stat().st_mtime).read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    ("node", "changes"),
    [("TextualInversion", {}), ("DreamBoothLoRA", {}), ("DreamBoothLoRA", {"preset.prior_weight": 1.0, **DRAWN}),
     ("CustomDiffusion", DRAWN)],
)  # fmt: skip
def test_each_node_trains_and_saves(server, object_info, node, changes):
    prompt = graph(server, object_info, node, **changes)
    assert prompts.run(server.client, prompt) == prompts.Outcome("success")
    about = newest_run(server)
    assert about["complete"] and about["steps"] == 2 and about["settings"]["method"] == node
    terms = {"denoising", "prior_preservation"} if changes else {"denoising"}
    log = max((server.base / "output" / "personalize" / "runs").glob("*/steps.jsonl"), key=lambda f: f.stat().st_mtime)
    assert json.loads(log.read_text().splitlines()[0])["terms"].keys() == terms


def test_class_images_of_a_folder_are_used(server, object_info):
    """None is drawn then: two of them, at any number of steps, would be another run."""
    folder = server.base / "input" / "dogs"
    folder.mkdir()
    for i in range(3):
        Image.new("RGB", (70, 64), (80 * i, 100, 50)).save(folder / f"{i}.png")
    (folder / "1.txt").write_text("a dog on a lawn")
    prompt = graph(server, object_info, "CustomDiffusion", {"class_folder": "dogs"})
    assert prompts.run(server.client, prompt) == prompts.Outcome("success")
    assert newest_run(server)["settings"]["concept"]["class_captions"] == ["", "a dog on a lawn", ""]


@pytest.mark.parametrize(
    ("references", "sentence"),
    [
        ({"class_folder": "nowhere"}, "The folder 'nowhere' does not exist"),
        ({"initializer_token": "id:99999"}, "The initializer 'id:99999' is not in the vocabulary"),
    ],
)
def test_bad_input_is_one_sentence(server, object_info, references, sentence):
    outcome = prompts.run(server.client, graph(server, object_info, "CustomDiffusion", references, **DRAWN))
    assert outcome.kind in ("failed", "refused") and sentence in outcome.message
    assert outcome.kind == "refused" or prompts.faults(outcome.message) == []
