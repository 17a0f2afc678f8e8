"""LoRA on Stable Diffusion: does what it declares train, and nothing else? Does a pattern choose layers?

On transformers: tests/nodes/test_native_training.py.
"""

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from personalize.tests.support import small
from personalize.tests.trainers.recipes.test_attndreambooth import snapshot
from personalize.tests.trainers.recipes.test_customization import concept
from personalize.trainers.recipes.lora import LoRA
from personalize.trainers.runs import train as training
from personalize.trainers.runs.run import Run
from personalize.trainers.training import timesteps, trainables

RECIPE = LoRA(steps=3, views=4, learning_rate=1e-2, prior_weight=0.5, class_images=2, class_image_steps=2)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The models after three steps, and the run's result."""
    models = small.models()
    return models, training.train(Run(concept=concept(), recipe=RECIPE), models, tmp_path_factory.mktemp("run"))


def test_the_adapters_change_and_nothing_else(trained):
    models, result = trained
    before = snapshot(small.models())
    after = {key.replace(".base_layer", ""): value for key, value in snapshot(models).items()}
    assert all(torch.equal(before[key], after[key]) for key in before)
    new = {key.partition(".lora_")[0] for key in after if key not in before}
    inside = {name for name, layer in small.models().unet.named_modules() if isinstance(layer, torch.nn.Linear)}
    assert {key.removeprefix("unet.") for key in new} == {name for name in inside if ".transformer_blocks." in name}
    assert result.tokens == {} and len(result.lora) == 3 * len(new)


def test_first_losses_equal_the_golden_ones(trained):
    golden = json.loads((Path(__file__).parents[2] / "golden" / "losses.json").read_text())
    assert [step["loss"] for step in trained[1].history] == pytest.approx(golden["lora"], rel=1e-3)


def test_a_pattern_chooses_layers():
    models = small.models()
    keys = trainables.layers(models, " *attn2.to_k , *nothing* ")
    assert keys and all(name.endswith("attn2.to_k") for name in keys)
    with pytest.raises(
        ValueError, match="No linear layer of this model fits '\\*nothing\\*': its layers are called such"
    ):
        trainables.layers(models, "*nothing*")


def test_timesteps_of_a_flow_are_logit_normal():
    """Of `sigmoid(z)`: quartiles at `sigmoid(+-0.674490)`, the median in the middle."""
    drawn = timesteps.logit_normal(1000, torch.Generator().manual_seed(0))(100_000).double()
    quartiles = torch.tensor([-0.674490, 0.0, 0.674490]).double().sigmoid() * 1000
    assert drawn.quantile(torch.tensor([0.25, 0.5, 0.75]).double()) == pytest.approx(quartiles, abs=4)
    assert drawn.min() >= 0 and drawn.max() <= 999
    models = small.models()
    plain = timesteps.natural(models, torch.Generator().manual_seed(0))(5)
    assert plain.tolist() == timesteps.uniform(models.alphas_cumprod, torch.Generator().manual_seed(0))(5).tolist()


def test_every_prompt_is_known_before_the_first_step():
    """Text encoders that do not train are asked once; captions stand in for templates."""
    from personalize.trainers.data.paired_views import PairedViews

    views = PairedViews(templates=("a {}", "one {}"), subjects=("sks dog",) * 2, augment=None, pool=1, batch_size=1)
    assert views.all_prompts(concept()) == ["a sks dog", "one sks dog"]
    assert views.all_prompts(concept(captions=("{} in a wood", ""))) == [
        "sks dog in a wood",
        "a sks dog",
        "one sks dog",
    ]
    assert views.all_prompts(concept(captions=("{} in a wood", "a {}"))) == ["sks dog in a wood", "a sks dog"]
    assert dataclasses.replace(views, templates=()).all_prompts(concept()) == []
