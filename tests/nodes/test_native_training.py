"""A training on the host's own modules: does it learn, resume, stop, show itself and come back like any other?

A tiny random Z-Image in its files' layout, through Train's own function.
"""

import types

import pytest
import torch

from personalize.trainers.data.concept import Concept
from personalize.trainers.recipes.lora import LoRA
from personalize.trainers.runs.preview import Preview
from personalize.trainers.runs.run import Run

pytestmark = pytest.mark.comfy
LAYERS = 4 * 6 + 2 * 5  # those of the text have no modulation
RECIPE = LoRA(steps=3, views=2, learning_rate=1e-2, lora_rank=2)
CONCEPT = Concept(
    images=(torch.rand(3, 64, 64, generator=torch.Generator().manual_seed(5)),),
    masks=(torch.ones(1, 64, 64),),
    resolution=64,
    placeholder_token="sks",
)


@pytest.fixture(scope="module")
def graph(tmp_path_factory):
    """MODEL, CLIP, VAE of a random Z-Image."""
    from personalize.tests.support import random_native

    folder = tmp_path_factory.mktemp("random")
    return random_native.load(random_native.write_checkpoint(folder / "zimage.safetensors"))


@pytest.fixture
def train(tmp_path, monkeypatch, graph):
    """`train(recipe, ...)`: the run's result, through the node's own function; and what it said."""
    import folder_paths

    from personalize.nodes import train

    said = []

    def go(recipe=RECIPE, folder="output", notify=said.append, preview=None, **run):
        monkeypatch.setattr(folder_paths, "get_output_directory", lambda: str(tmp_path / folder))
        hidden = types.SimpleNamespace(unique_id="1", extra_pnginfo=None)
        options = {"hidden": hidden, "checkpoint_every": 1, "preview": preview, "warn": said.append}
        return train.find_or_train(*graph, Run(concept=CONCEPT, recipe=recipe, **run), notify, **options)

    go.said = said
    return go


def test_it_trains_and_all_of_its_keys_are_used(graph, train):
    import comfy.lora
    import comfy.lora_convert

    from personalize.nodes.apply import apply

    result = train(preview=Preview(prompts=("a photo of {}",), every=1, steps=2, guidance=2.0))
    assert result.complete and result.steps == 3 and len(result.lora) == 3 * LAYERS
    key_map = comfy.lora.model_lora_keys_unet(graph[0].model, {})
    loaded = comfy.lora.load_lora(comfy.lora_convert.convert_lora(dict(result.lora)), key_map, log_missing=True)
    assert {key for adapter in loaded.values() for key in adapter.loaded_keys} == set(result.lora)
    assert sorted(path.name for path in (result.folder / "previews").iterdir()) == [
        f"step_{step:04d}.png" for step in range(4)
    ]
    model, _ = apply(*graph[:2], result)
    assert len(model.patches) == LAYERS
