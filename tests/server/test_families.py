"""The shipped workflow on a real server, with small random checkpoints of every family's real key layout."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from personalize.demo import show
from personalize.demo.workflow import override, to_api
from personalize.tests.support import host, prompts

ROOT = Path(__file__).resolve().parents[2]
KINDS = ("SD 1.x", "SD 2.x epsilon", "SD 2.x v", "SDXL", "SDXL v with zero terminal SNR")
pytestmark = [pytest.mark.slow, pytest.mark.comfy]


@pytest.fixture(scope="module")
def checkpoints(server):
    """File names of a random checkpoint per kind, in the server's folder."""
    from personalize.tests.support import random_sd

    names = {kind: f"random {kind}.safetensors" for kind in KINDS}
    for kind, name in names.items():
        random_sd.write_checkpoint(server.base / "models" / "checkpoints" / name, kind)
    return names


@pytest.fixture(scope="module")
def workflow(object_info):
    """`workflow(checkpoint, preset)`: workflows/before_and_after.json as an API prompt of two steps."""
    plain = to_api(show.read_json(ROOT / "workflows" / "before_and_after.json"), object_info)
    options = object_info["PersonalizeTextBoost"]["input"]["required"]["preset"][1]["options"]
    fields = {option["key"]: prompts.defaults(option["inputs"]) for option in options}

    def build(checkpoint, preset="benchmark", resolution=64):
        prompt = override(override(plain, host.demo_overrides()), host.QUICK)
        prompt = override(
            prompt,
            {
                "CheckpointLoaderSimple": {"ckpt_name": checkpoint},
                "PersonalizeLoadReferences": {"resolution": resolution},
                "EmptyLatentImage": {"width": resolution, "height": resolution},
                "PersonalizeTrain": {"preview_every": 1, "preview_steps": 1},
            },
        )
        (recipe,) = (node for node in prompt.values() if node["class_type"] == "PersonalizeTextBoost")
        values = {f"preset.{name}": value for name, value in fields[preset].items()}
        small = {"preset.steps": 2, "preset.batch_size": 2, "preset.views": 4, **host.CAPTIONS}
        recipe["inputs"] = {"preset": preset, **values, **small}
        return prompt

    return build


def drawn(server, prompt):
    """The untrained and the trained image, and the run that the training left."""
    before = {*(server.base / "output" / "personalize" / "runs").glob("*")}
    images = server.images(server.run(prompt))
    (run,) = {*(server.base / "output" / "personalize" / "runs").glob("*")} - before
    untrained, trained = (images[show.node_titled(prompt, t)][0] for t in (show.UNTRAINED, show.TRAINED))
    return np.asarray(untrained), np.asarray(trained), json.loads((run / "run.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("preset", ["benchmark", "2026++"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_workflow_trains_and_draws_with_every_family(server, checkpoints, workflow, kind, preset):
    untrained, trained, about = drawn(server, workflow(checkpoints[kind], preset))
    assert untrained.shape == trained.shape == (64, 64, 3)
    assert np.isfinite(trained).all() and trained.std() > 1
    assert (untrained != trained).any()
    assert about["complete"] and about["steps"] == 2


def test_sdxl_trains_an_image_that_is_not_square(server, checkpoints, workflow):
    """In its bucket, and draws at that size, too."""
    Image.new("RGB", (300, 150), (200, 30, 30)).save(server.base / "input" / "wide.png")
    prompt = workflow(checkpoints["SDXL"], resolution=128)
    wide = {"LoadImage": {"image": "wide.png"}, "PersonalizeLoadReferences": {"crop": "bucket"}}
    wide |= {"EmptyLatentImage": {"width": 184, "height": 88}}
    untrained, trained, about = drawn(server, override(prompt, wide))
    assert trained.shape == (88, 184, 3) and (untrained != trained).any() and about["complete"]


def test_fields_of_another_preset_are_passed_over(server, checkpoints, workflow):
    """A prompt whose preset was changed by hand still has the other's fields."""
    prompt = workflow(checkpoints["SD 1.x"])
    about = drawn(server, override(prompt, {"PersonalizeTextBoost": {"preset": "2026 CPA"}}))[2]
    assert about["settings"]["method"] == "TextBoost2026" and about["settings"]["recipe"]["steps"] == 2


def test_a_clip_of_another_family_is_one_sentence(server, checkpoints, workflow):
    """SDXL's MODEL with SD 1.x's CLIP."""
    from personalize.demo import client as api

    prompt = workflow(checkpoints["SDXL"])
    prompt["other"] = {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": checkpoints["SD 1.x"]}}
    (train,) = (node for node in prompt.values() if node["class_type"] == "PersonalizeTrain")
    train["inputs"]["clip"] = ["other", 1]
    with pytest.raises(api.HostError, match="does not belong to an SDXL model"):
        server.run(prompt)
