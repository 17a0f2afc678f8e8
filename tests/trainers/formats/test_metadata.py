"""What files say of themselves, as viewers of LoRAs read it: trigger words, the kind of network, the class word."""

import json

import pytest
import torch

from personalize.tests.support import small
from personalize.trainers.data.concept import Concept
from personalize.trainers.formats import metadata
from personalize.trainers.recipes.custom_diffusion import CustomDiffusion
from personalize.trainers.runs.result import from_other_programs
from personalize.trainers.runs.run import Run
from personalize.trainers.runs.train import train


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    """Of a method whose prompts say the class word, too: `<thing> dog`."""
    concept = Concept(images=(torch.rand(3, 32, 32),) * 2, resolution=32, placeholder_token="<thing>", class_word="dog")
    recipe = CustomDiffusion(steps=1, batch_size=1, prior_weight=0.0)
    return train(Run(concept=concept, recipe=recipe), small.models(), tmp_path_factory.mktemp("run"))


def test_the_trigger_phrase_is_what_prompts_say(result):
    said = result.metadata("mine")
    assert said["modelspec.trigger_phrase"] == "<thing> dog"
    assert json.loads(said["ss_dataset_dirs"]) == {"1_<thing> dog": {"n_repeats": 1, "img_count": 2}}
    assert json.loads(said["ss_tag_frequency"]) == {"1_<thing> dog": {"<thing> dog": 2}}


@pytest.mark.parametrize("kind", ["textual-inversion", ""])
def test_only_a_lora_names_a_network(result, kind):
    assert not [name for name in result.metadata("mine", kind) if name.startswith("ss_network")]


def test_whole_weights_are_a_network_of_lycoris():
    full = from_other_programs("full", {"lora_unet_conv_in.diff": torch.ones(32, 4, 3, 3)}, {}, {})
    said = metadata.describe(full, "mine", "lora")
    assert said["ss_network_module"] == "lycoris.kohya" and json.loads(said["ss_network_args"]) == {"algo": "full"}
