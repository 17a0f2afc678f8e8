"""Weights in the formats that graphs bring, and what a training cannot see of a graph: it says so."""

import json

import pytest
import torch
from safetensors.torch import load_file

pytestmark = pytest.mark.comfy
KEY = "diffusion_model.input_blocks.4.1.transformer_blocks.0.attn2.to_k.weight"
TEXT = "clip_l.transformer.text_model.encoder.layers.0.self_attn.q_proj.weight"


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    from personalize.tests.support import random_sd

    return random_sd.write_checkpoint(tmp_path_factory.mktemp("random") / "random.safetensors", "SDXL")


@pytest.fixture(scope="module")
def graph(file):
    from personalize.tests.support import random_sd

    return random_sd.load(file, "SDXL")


def read(model, clip, vae):
    from personalize.nodes.host import session, weights

    with session.training_session():
        return weights.read_models(weights.GraphModels.of(model, clip, vae), torch.float32)


def patched(model):
    """A clone with a LoRA-like patch of one weight."""
    clone = model.clone()
    clone.add_patches({KEY: ("diff", (torch.full((64, 160), 0.5),))})
    return clone


def weight_of(models):
    return models.unet.down_blocks[1].attentions[0].transformer_blocks[0].attn2.to_k.weight.data


def test_fp8_weights_are_read_and_patches_stay_whole(file, graph):
    """The base is rounded as stored; what a LoRA adds is not rounded to fp8 with it."""
    import comfy.sd

    from personalize.nodes.host import weights

    with torch.inference_mode():
        model = comfy.sd.load_checkpoint_guess_config(str(file), model_options={"dtype": torch.float8_e4m3fn})[0]
    stored = dict(model.model.named_parameters())[KEY]
    assert stored.dtype == torch.float8_e4m3fn
    ours = weight_of(read(patched(model), *graph[1:]))
    assert torch.equal(ours, stored.float() + 0.5)
    one, other = (weights.GraphModels.of(each, *graph[1:]) for each in (model, patched(model)))
    assert weights.fingerprint(one) != weights.fingerprint(other)


def test_comfy_quant_weights_are_dequantised(file, graph):
    import comfy.sd

    from personalize.nodes.host import weights

    state = load_file(file)
    original = state["model." + KEY]
    for key in [key for key in state if key.startswith("model.diffusion_model.") and ".attn2.to_k." in key]:
        scale = state[key].abs().max() / 448
        state[key] = (state[key] / scale).to(torch.float8_e4m3fn)
        base = key.removesuffix("weight")
        state[f"{base}weight_scale"] = scale.float()
        form = json.dumps({"format": "float8_e4m3fn"}).encode()
        state[f"{base}comfy_quant"] = torch.tensor(list(form), dtype=torch.uint8)
    with torch.inference_mode():
        model = comfy.sd.load_state_dict_guess_config(state)[0]
    assert type(dict(model.model.named_parameters())[KEY].data).__name__ == "QuantizedTensor"
    ours = weight_of(read(patched(model), *graph[1:]))
    assert (ours - 0.5 - original).abs().max() < 0.07 * original.abs().max()  # e4m3 has three bits behind the point
    assert not torch.equal(ours - 0.5, original)
    one, other = (weights.GraphModels.of(each, *graph[1:]) for each in (model, patched(model)))
    assert weights.fingerprint(one) != weights.fingerprint(other)


def test_weights_that_only_their_loader_reads_are_refused_in_one_sentence(graph):
    from personalize.nodes.host import weights
    from personalize.tests.support import prompts

    model = graph[0].clone()
    with pytest.raises(ValueError) as error:
        weights._unpatched(model, KEY, torch.zeros(4, dtype=torch.uint8))
    assert "GGUF" in str(error.value) and not prompts.faults(str(error.value))


def test_a_plain_graph_needs_no_warning(graph, tmp_path):
    from comfy_extras.nodes_model_advanced import ModelSamplingDiscrete

    from personalize.nodes.host import unsupported

    model, clip = graph[:2]
    assert unsupported.warning(model, clip) == ""
    skipping = clip.clone()
    skipping.clip_layer(-2)
    skipping.add_patches({TEXT: ("diff", (torch.zeros(64, 64),))})
    model = ModelSamplingDiscrete().patch(patched(model), "v_prediction", False)[0]
    assert unsupported.warning(model, skipping) == ""


def test_what_this_pack_returns_needs_no_warning(graph, tmp_path):
    """Fixed outputs, learned words and adapters are seen by the next training."""
    import dataclasses

    from personalize.nodes.apply import apply
    from personalize.nodes.host import session, unsupported, weights
    from personalize.trainers.data.concept import Concept
    from personalize.trainers.recipes import textboost, textboost_2026
    from personalize.trainers.runs import train
    from personalize.trainers.runs.run import Run

    for recipe in (textboost.BENCHMARK, textboost_2026.PLUS):
        concept = Concept(images=(torch.rand(3, 64, 64),), resolution=64)
        run = Run(concept=concept, recipe=dataclasses.replace(recipe, steps=1, batch_size=1, views=1))
        with session.training_session():
            models = weights.read_models(weights.GraphModels.of(*graph), torch.float32)
            result = train.train(run, models, tmp_path / type(recipe).__name__)
        for exact in (False, True):
            assert unsupported.warning(*apply(*graph[:2], result, in_full_precision=exact)) == ""


def test_everything_a_training_cannot_see_is_named(graph):
    """A bypass LoRA, a hook LoRA, FreeU, a guidance rescale, wrappers: by the host's own nodes."""
    import comfy.hooks
    import comfy.sd
    from comfy.patcher_extension import WrappersMP

    from personalize.nodes.host import unsupported
    from personalize.tests.support import prompts

    model, clip = graph[:2]
    name = "lora_te1_text_model_encoder_layers_0_self_attn_q_proj"
    lora = {f"{name}.lora_down.weight": torch.randn(2, 64), f"{name}.lora_up.weight": torch.randn(64, 2)}
    lora |= {f"{name}.alpha": torch.tensor(2.0)}
    bypassing = comfy.sd.load_bypass_lora_for_models(model, clip, lora, 1.0, 1.0)[1]
    assert "a bypass LoRA on the CLIP" in unsupported.warning(model, bypassing)
    hooked, hooked_clip, _ = comfy.hooks.load_hook_lora_for_models(model, clip, lora, 1.0, 1.0)
    assert "hooks on the CLIP" in unsupported.warning(hooked, hooked_clip)
    other = model.clone()
    other.set_model_output_block_patch(lambda h, hsp, options: (h, hsp))
    other.set_model_attn2_patch(lambda n, k, v, options: (n, k, v))
    other.set_model_sampler_cfg_function(lambda args: args["cond"])
    other.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, "other", lambda executor, *args: executor(*args))
    other.add_object_patch("diffusion_model.forward", lambda *args: args)
    said = unsupported.warning(other, clip)
    for what in ("output_block_patch", "attn2_patch", "a guidance function", "wrappers", "a patch of diffusion_model"):
        assert what in said
    assert not prompts.faults(said)
