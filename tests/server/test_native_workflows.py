"""The templates for transformers on a real server, with a random model: they train, generate and save."""

import pytest

from personalize.demo import show
from personalize.demo.workflow import override, to_api
from personalize.tests.support import prompts
from personalize.tests.support.host import ROOT

pytestmark = [pytest.mark.slow, pytest.mark.comfy]
NAMES = ("one_picture_z_image", "one_picture_qwen_image")
CHECKPOINT = "random Z-Image template.safetensors"
QUICK = {
    "LoadImage": {"image": "reference.png"},
    "PersonalizeLoadReferences": {"resolution": 64},
    "PersonalizeLoRA": {"preset.steps": 2, "preset.views": 2, "preset.lora_rank": 2, "preset.learning_rate": 0.01},
    "PersonalizeTrain": {"preview_every": 0},
    "EmptySD3LatentImage": {"width": 64, "height": 64, "batch_size": 2},
    "KSampler": {"steps": 2, "seed": 1},
    "PersonalizeSave": {"name": "template"},
}
PARTS = {"UNETLoader": 0, "CLIPLoader": 1, "VAELoader": 2}  # as outputs of Load Checkpoint


@pytest.fixture(scope="module")
def checkpoint(server):
    from personalize.tests.support import random_native

    random_native.write_checkpoint(server.base / "models" / "checkpoints" / CHECKPOINT)


def from_one_file(prompt):
    """The prompt with the loaders of three files exchanged for one of a checkpoint."""
    loaders = {node: PARTS[each["class_type"]] for node, each in prompt.items() if each["class_type"] in PARTS}
    assert sorted(loaders.values()) == [0, 1, 2]
    found = {node: each for node, each in prompt.items() if node not in loaders}
    found = prompts.relinked(found, {(node, 0): ["checkpoint", output] for node, output in loaders.items()})
    return found | {"checkpoint": {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": CHECKPOINT}}}


@pytest.mark.usefixtures("checkpoint")
@pytest.mark.parametrize("name", NAMES)
def test_a_template_trains_generates_and_saves(server, object_info, name):
    prompt = to_api(show.read_json(ROOT / "workflows" / f"{name}.json"), object_info)
    prompt = from_one_file(override(prompt, QUICK))
    history = server.run(prompt)
    images = server.images(history)[show.node_titled(prompt, "New images")]
    assert len(images) == 2 and images[0].size == (64, 64) and images[0].tobytes() != images[1].tobytes()
    said = history["outputs"][show.node_titled(prompt, "Keeps what it learned")]["text"][0]
    assert "in loras and in personalize" in said
