"""The LoRA of text encoder and U-Net in other programs: do the host and diffusers compute what was trained?

The U-Net's LoRA and mixing; the text encoder alone: test_export.py and test_host.py.
"""

import dataclasses

import pytest
import torch

from personalize.tests.support import small
from personalize.trainers.data.concept import Concept
from personalize.trainers.models.diffusion import Encoding
from personalize.trainers.recipes.textboost import TextBoost
from personalize.trainers.runs import train as training
from personalize.trainers.runs.run import Run

pytestmark = pytest.mark.comfy
RECIPE = TextBoost(
    steps=3, batch_size=2, views=4, lora_learning_rate=2e-2, unet_lora_rank=3, unet_lora_learning_rate=0.1,
    captions=small.CAPTIONS,
)  # fmt: skip
KEY = "diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_v.weight"


@pytest.fixture(scope="module")
def graph(tmp_path_factory):
    """MODEL, CLIP, VAE of a random checkpoint."""
    from personalize.tests.support import random_sd

    return random_sd.graph(tmp_path_factory.mktemp("random"))


def train(graph, folder, **changes):
    """Models after a short training with large steps, and the run's result."""
    from personalize.nodes.host import session, weights

    concept = Concept(images=(torch.rand(3, 64, 64),), resolution=64, placeholder_token=changes.pop("token", "<thing>"))
    with session.training_session():
        models = weights.read_models(weights.GraphModels.of(*graph), torch.float32)
        run = Run(concept=concept, recipe=dataclasses.replace(RECIPE, **changes))
        return models, training.train(run, models, folder)


@pytest.fixture(scope="module")
def trained(graph, tmp_path_factory):
    return train(graph, tmp_path_factory.mktemp("run"))


def host_unet(model, *inputs):
    from personalize.tests.support.saved import unet_of_the_host

    return unet_of_the_host(model, *inputs)


def inputs():
    g = torch.Generator().manual_seed(1)
    return torch.randn(2, 4, 16, 16, generator=g), torch.tensor([3, 801]), torch.randn(2, 77, 64, generator=g)


def test_host_uses_every_key(graph, trained):
    import comfy.lora
    import comfy.lora_convert

    key_map = comfy.lora.model_lora_keys_unet(graph[0].model, {})
    key_map = comfy.lora.model_lora_keys_clip(graph[1].cond_stage_model, key_map)
    loaded = comfy.lora.load_lora(comfy.lora_convert.convert_lora(trained[1].lora), key_map, log_missing=True)
    assert {key for adapter in loaded.values() for key in adapter.loaded_keys} == set(trained[1].lora)
    blocks = {key.rpartition(".attn2.")[0] for key in graph[0].model.state_dict() if ".attn2." in key}
    in_unet = {key for key in loaded if key.startswith("diffusion_model.")}
    assert in_unet == {f"{block}.attn2.to_{x}.weight" for block in blocks for x in "kv"}
    assert len(loaded) == len(in_unet) + 3 * 3 + 1  # q, k, v of three layers, and what diffusers looks for


def test_returned_model_equals_the_trained_unet(graph, trained):
    from personalize.nodes.apply import apply

    models, result = trained
    model, _ = apply(graph[0], graph[1], result)
    with torch.no_grad():
        latents, timesteps, context = inputs()
        ours = models.predict(latents, timesteps, Encoding(parts=(context,)))
    before = host_unet(graph[0], *inputs())
    difference, effect = (host_unet(model, *inputs()) - ours).abs().max(), (ours - before).abs().max()
    print(f"difference {difference:.1e}, effect {effect:.1e}")
    assert effect > 0.05
    assert difference < 1e-4
    assert torch.equal(host_unet(graph[0], *inputs()), before)


def test_strengths_are_apart(graph, trained):
    from personalize.nodes.apply import apply

    def words(clip):
        with torch.inference_mode():
            return clip.encode_from_tokens(clip.tokenize("a dog")).clone()

    model, clip = apply(*graph[:2], trained[1], strength_unet=0.0)
    assert (host_unet(model, *inputs()) - host_unet(graph[0], *inputs())).abs().max() < 1e-5
    assert (words(clip) - words(graph[1])).abs().max() > 0.05
    model, clip = apply(*graph[:2], trained[1], strength_text_encoder=0.0)
    assert (host_unet(model, *inputs()) - host_unet(graph[0], *inputs())).abs().max() > 0.05
    assert (words(clip) - words(graph[1])).abs().max() < 1e-5


@pytest.mark.parametrize(
    ("kind", "text_keys"),
    [("SD 2.x v", {"lora_te": 2 * 3 + 1}), ("SDXL", {"lora_te1": 2 * 3 + 1, "lora_te2": 3 * 3 + 1})],
)
def test_host_uses_every_key_of_other_families(tmp_path, kind, text_keys):
    """Of all text encoders: q, k, v of each layer that is read, and what diffusers looks for."""
    import comfy.lora
    import comfy.lora_convert

    from personalize.tests.support import random_sd

    graph = random_sd.graph(tmp_path, kind)
    lora = train(graph, tmp_path / "run", text_encoder="both")[1].lora
    key_map = comfy.lora.model_lora_keys_unet(graph[0].model, {})
    key_map = comfy.lora.model_lora_keys_clip(graph[1].cond_stage_model, key_map)
    loaded = comfy.lora.load_lora(comfy.lora_convert.convert_lora(lora), key_map, log_missing=True)
    assert {key for adapter in loaded.values() for key in adapter.loaded_keys} == set(lora)
    layers = [key for key in lora if key.endswith(".alpha")]
    counts = {prefix: sum(key.startswith(f"{prefix}_text") for key in layers) for prefix in text_keys}
    assert counts == text_keys
    blocks = {key.rpartition(".attn2.")[0] for key in graph[0].model.state_dict() if ".attn2." in key}
    assert len(layers) == 2 * len(blocks) + sum(text_keys.values()) == len(loaded)


@pytest.mark.parametrize("prefix", ["lora_unet_down_blocks_0", "lora_te_text_model"])
def test_a_lora_of_another_family_is_refused(graph, trained, prefix):
    from personalize.nodes.apply import apply

    other = {key.replace(prefix, f"{prefix}_9"): value for key, value in trained[1].lora.items()}
    with pytest.raises(ValueError, match="family"):
        apply(graph[0], graph[1], dataclasses.replace(trained[1], lora=other))


def test_an_object_and_a_style_merge_by_adding(graph, tmp_path):
    """On the host, one after the other: each row of the text encoder is what one of the two makes of it, exactly."""
    from personalize.nodes.apply import apply

    results = {
        mixing: train(graph, tmp_path / mixing, mixing=mixing, token=f"<{mixing}>")[1] for mixing in ("object", "style")
    }

    def weights(*names):
        model, clip = graph[:2]
        for name in names:
            model, clip = apply(model, clip, results[name])
        key = "clip_l.transformer.text_model.encoder.layers.1.self_attn.q_proj.weight"
        return clip.patcher.patch_weight_to_device(key, return_weight=True)

    merged, even, odd, plain = weights("object", "style"), weights("object"), weights("style"), weights()
    assert torch.equal(merged[0::2], even[0::2]) and torch.equal(merged[1::2], odd[1::2])
    assert torch.equal(even[1::2], plain[1::2]) and torch.equal(odd[0::2], plain[0::2])
    assert (merged != plain).any(dim=1).all()


def test_diffusers_loads_both_parts(comfyui, tmp_path):
    from personalize.tests.support import small
    from personalize.tests.trainers.formats.test_kohya import pipeline

    models = small.models()
    recipe = dataclasses.replace(RECIPE, fixed_outputs=False, augmentation_prompt="words")
    concept = Concept(images=(torch.rand(3, 32, 32),), resolution=32)
    training.train(Run(concept=concept, recipe=recipe), models, tmp_path)
    pipe = pipeline(comfyui, models.family)
    x, t, context = torch.randn(2, 4, 8, 8), torch.tensor([3, 801]), torch.randn(2, 77, 32)
    with torch.no_grad():
        before = pipe.unet(x, t, context).sample
        pipe.load_lora_weights(str(tmp_path), weight_name="lora.safetensors")
        ours, theirs = models.predict(x, t, Encoding(parts=(context,))), pipe.unet(x, t, context).sample
        words, other = models.encode_prompts(["a dog"]).hidden_states, pipe.encode_prompt("a dog", "cpu", 1, False)[0]
    assert (ours - before).abs().max() > 0.02
    assert (ours - theirs).abs().max() < 1e-4
    assert (words - other).abs().max() < 1e-4
