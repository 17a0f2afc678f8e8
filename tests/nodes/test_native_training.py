"""A training on the host's own modules: does it learn, resume, stop, show itself and come back like any other?

A tiny random Z-Image in its files' layout, through Train's own function.
"""

import types

import pytest
import torch

from personalize.tests.nodes.test_clip_early_stopping import WORLD, clip_vision  # noqa: F401 - a fixture
from personalize.tests.support import prompts
from personalize.trainers.data.concept import Concept
from personalize.trainers.formats.z_image import with_diffusers_names
from personalize.trainers.recipes import METHODS
from personalize.trainers.recipes.lora import LoRA
from personalize.trainers.recipes.t_lora import TLoRA
from personalize.trainers.runs.preview import Preview
from personalize.trainers.runs.run import Run
from personalize.trainers.stopping.clip_early_stopping import ClipEarlyStopping
from personalize.trainers.stopping.dvar import DVAR
from personalize.trainers.stopping.monitor import FixedSteps

pytestmark = pytest.mark.comfy
LAYERS = 4 * 6 + 2 * 5  # those of the text have no modulation
RECIPE = LoRA(steps=3, views=2, learning_rate=1e-2, lora_rank=2)
CONCEPT = Concept(
    images=(torch.rand(3, 64, 64, generator=torch.Generator().manual_seed(5)),),
    masks=(torch.ones(1, 64, 64),),
    resolution=64,
    placeholder_token="sks",
)
PREVIEW = Preview(prompts=("a photo of {}",), every=1, steps=2, guidance=2.0)


class Killed(BaseException):
    """In the place of a signal."""


@pytest.fixture(scope="module")
def graph(tmp_path_factory):
    """MODEL, CLIP, VAE of a random Z-Image."""
    from personalize.tests.support import random_native

    folder = tmp_path_factory.mktemp("random")
    return random_native.load(random_native.write_checkpoint(folder / "zimage.safetensors"))


@pytest.fixture(scope="module")
def train(tmp_path_factory, graph):
    """`train(recipe, ...)`: the run's result, through the node's own function; and what it said."""
    import folder_paths

    from personalize.nodes import train

    base, said = tmp_path_factory.mktemp("base"), []

    def go(recipe=RECIPE, folder="output", notify=said.append, preview=None, **run):
        hidden = types.SimpleNamespace(unique_id="1", extra_pnginfo=None)
        options = {"hidden": hidden, "checkpoint_every": 1, "preview": preview, "warn": said.append}
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(folder_paths, "get_output_directory", lambda: str(base / folder))
            return train.find_or_train(*graph, Run(concept=CONCEPT, recipe=recipe, **run), notify, **options)

    go.said = said
    return go


@pytest.fixture(scope="module")
def trained(train):
    return train(preview=PREVIEW)


def test_it_trains_and_shows_itself(graph, train, trained):
    from personalize.nodes.apply import apply

    assert trained.complete and trained.steps == 3 and len(trained.lora) == 3 * LAYERS and not trained.tokens
    shown = sorted(path.name for path in (trained.folder / "previews").iterdir())
    assert shown == [f"step_{step:04d}.png" for step in range(4)]
    assert any(sentence.startswith("lora: about ") and "GB of memory besides" in sentence for sentence in train.said)
    model, _ = apply(*graph[:2], trained)
    assert len(model.patches) == LAYERS
    assert trained.metadata("name")["ss_network_dim"] == "2"


def test_the_same_inputs_do_not_train_twice(train, trained, monkeypatch):
    from personalize.nodes.host import weights

    monkeypatch.setattr(weights, "read_models", lambda *given: pytest.fail("read"))
    again = train(preview=PREVIEW)
    assert again.folder == trained.folder and len(again.history) == 3


def kill(sentence):
    if "lora: step 2 of 3" in sentence:
        raise Killed


@pytest.mark.parametrize("recipe", [RECIPE, TLoRA(steps=3, views=2, learning_rate=1e-2, lora_rank=4, min_rank=1)])
def test_a_killed_run_ends_with_the_files_of_an_undisturbed_one(train, recipe):
    undisturbed = train(recipe, preview=PREVIEW)
    with pytest.raises(Killed):
        train(recipe, folder="killed", notify=kill, preview=PREVIEW)
    resumed = train(recipe, folder="killed", preview=PREVIEW)
    assert resumed.folder.name == undisturbed.folder.name and resumed.complete
    assert resumed.rank_schedule == undisturbed.rank_schedule
    assert [entry["loss"] for entry in resumed.history] == [entry["loss"] for entry in undisturbed.history]
    assert all(torch.equal(resumed.lora[key], value) for key, value in undisturbed.lora.items())


@pytest.mark.usefixtures("clip_vision")
def test_monitors_see_it_and_end_it(train, trained):
    """DVAR's fixed batch changes nothing of what is learned, nor do images that a CLIP scores."""
    dvar = DVAR(window=2, batch_size=2, threshold=0.0)
    clip = ClipEarlyStopping(every=1, images=1, sampler_steps=2, **WORLD)
    result = train(stopper=(dvar, clip, FixedSteps(steps=2)))
    losses = [entry["measures"]["DVAR"]["fixed_loss"] for entry in result.history]
    assert len(losses) == 2 and losses[0] != losses[1]
    assert all(-1 <= entry["measures"]["CLIP Early Stopping"]["score"] <= 1 for entry in result.history)
    assert [stop["monitor"] for stop in result.stops] == ["Fixed Steps"] and result.complete
    assert [entry["loss"] for entry in result.history] == [entry["loss"] for entry in trained.history[:2]]


def test_finish_now_keeps_what_was_learned(train, monkeypatch):
    from personalize.nodes.host.live import Live

    monkeypatch.setattr(Live, "finish", lambda self: True)
    result = train(folder="finished")
    assert result.complete and result.steps == 1 and "finished by hand" in result.stop_reason


def test_a_complete_file_brings_it_back(graph, trained, tmp_path):
    from safetensors.torch import load_file, save_file

    from personalize.nodes.apply import apply
    from personalize.trainers.files import tensors
    from personalize.trainers.runs.result import complete, read_complete

    state, header = complete(trained, "name")
    save_file(state, tmp_path / "name.safetensors", metadata=header)
    back = read_complete(*tensors(tmp_path / "name.safetensors"), tmp_path / "name.safetensors")
    assert load_file(tmp_path / "name.safetensors").keys() == {f"lora.{key}" for key in trained.lora}
    assert all(torch.equal(back.lora[key], value) for key, value in trained.lora.items())
    assert len(apply(*graph[:2], back)[0].patches) == LAYERS


def test_the_saved_file_is_the_stock_loaders(graph, trained):
    """Queries, keys and values apart, each a third of the host's; every key is used."""
    import comfy.lora
    import comfy.lora_convert

    state = with_diffusers_names(trained.lora)
    assert len(state) == 3 * (LAYERS + 2 * 6)
    key_map = comfy.lora.model_lora_keys_unet(graph[0].model, {})
    loaded = comfy.lora.load_lora(comfy.lora_convert.convert_lora(dict(state)), key_map, log_missing=True)
    assert {key for adapter in loaded.values() for key in adapter.loaded_keys} == set(state)

    def product(lora, name):
        return lora[f"{name}.lora_up.weight"] @ lora[f"{name}.lora_down.weight"] * lora[f"{name}.alpha"] / 2

    parts = [product(state, f"diffusion_model.layers.1.attention.to_{part}") for part in "qkv"]
    assert torch.allclose(torch.cat(parts), product(trained.lora, "lora_unet_layers_1_attention_qkv"))
    assert with_diffusers_names({"lora_unet_x.lora_up.weight": torch.ones(2, 2)}).keys() == {
        "lora_unet_x.lora_up.weight"
    }


def test_the_saved_file_is_diffusers(trained):
    """Every key is used."""
    import diffusers

    if not hasattr(diffusers, "ZImageTransformer2DModel"):
        pytest.skip(f"diffusers {diffusers.__version__} has no Z-Image")
    from diffusers.loaders.lora_conversion_utils import _convert_non_diffusers_z_image_lora_to_diffusers as converted

    shape = {"dim": 256, "n_layers": 2, "n_refiner_layers": 2, "n_heads": 8, "n_kv_heads": 8, "cap_feat_dim": 32}
    with torch.device("meta"):
        theirs = diffusers.ZImageTransformer2DModel(**shape, axes_dims=[16, 8, 8], axes_lens=[64, 64, 64])
    linear = {name for name, layer in theirs.named_modules() if isinstance(layer, torch.nn.Linear)}
    read = converted(dict(with_diffusers_names(trained.lora)))
    assert {key.removeprefix("transformer.").rpartition(".lora_")[0] for key in read} <= linear and len(read) == 2 * 46


def test_what_stable_diffusion_alone_has_is_refused(graph):
    from personalize.nodes import show_attention

    reading = show_attention.Reading("trained", *graph[:2], "a dog", ["dog"])
    with pytest.raises(ValueError, match="^Z-Image models have no cross-attention to show: connect a model of SD 1"):
        show_attention._places([reading], graph[2])


def test_prior_preservation_generates_its_own_images(train):
    recipe = LoRA(
        steps=2, views=2, lora_rank=2, prior_weight=0.5, class_images=2, class_image_steps=2, layers="*attention*"
    )
    result = train(recipe)
    assert {*result.history[0]["terms"]} == {"denoising", "prior_preservation"}
    assert all("_attention_" in key for key in result.lora) and len(result.lora) == 3 * 2 * 6


@pytest.mark.parametrize("method", [name for name, presets in METHODS.items() if next(iter(presets.values())).needs])
def test_methods_that_need_stable_diffusion_say_so(train, method):
    with pytest.raises(
        ValueError, match=f"^{method} needs .*, which Z-Image models do not have here: use T-LoRA or LoRA.$"
    ) as e:
        train(next(iter(METHODS[method].values())))
    assert not prompts.faults(str(e.value))


def test_where_memory_is_short_the_blocks_are_run_twice(graph):
    """The plan with gradient checkpointing needs less, and the estimate grows with the area."""
    from personalize.nodes.host import session, weights
    from personalize.trainers.training import memory

    with session.training_session():
        models = weights.read_models(weights.GraphModels.of(*graph), torch.float32)
        models.to("cpu", torch.float32)
        models.unet.requires_grad_(True)
        plain, larger = (memory.activation_bytes(models, side, False) for side in (32, 64))
        assert 2.5 * plain < larger < 4.1 * plain
        assert memory.activation_bytes(models, 64, True) < 0.6 * larger
        assert not models.checkpointing
