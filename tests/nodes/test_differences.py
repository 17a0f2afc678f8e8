"""Full differences of weights and biases in a LoRA file: does every loader add all of them, and ours exactly?"""

import pytest
import torch
from safetensors.torch import load_file

from personalize.tests.support.saved import load, same, save, stock, unet, words
from personalize.trainers.runs.result import from_other_programs

pytestmark = pytest.mark.comfy
KINDS = ("SD 1.x", "SD 2.x v", "SDXL")


@pytest.fixture(scope="module", params=KINDS)
def graph(tmp_path_factory, request):
    """MODEL, CLIP, VAE of a random checkpoint."""
    from personalize.tests.support import random_sd

    return random_sd.graph(tmp_path_factory.mktemp("random"), request.param)


def result_of(lora):
    return from_other_programs("theirs", lora, {}, "", ())


@pytest.fixture
def differences(graph):
    """Full differences of weights and biases, and a LoRA with the difference of its bias; {name in a file: tensor}."""
    xl = graph[0].model.model_config.unet_config["context_dim"] == 160
    te = f"lora_{'te1' if xl else 'te'}_text_model_encoder_layers_0"
    unet, inner, context = f"lora_unet_down_blocks_{int(xl)}_attentions_0", (64 if xl else 32), (160 if xl else 64)
    state = {
        f"{te}_mlp_fc1.diff": torch.randn(256, 64) * 0.1,
        f"{te}_mlp_fc1.diff_b": torch.randn(256) * 0.1,
        f"{te}_mlp_fc2.diff_b": torch.randn(64) * 0.5,
        f"{te}_self_attn_q_proj.lora_down.weight": torch.randn(2, 64) * 0.3,
        f"{te}_self_attn_q_proj.lora_up.weight": torch.randn(64, 2) * 0.3,
        f"{te}_self_attn_q_proj.alpha": torch.tensor(1.0),
        f"{te}_self_attn_q_proj.diff_b": torch.randn(64) * 0.1,
        f"{unet}_transformer_blocks_0_attn2_to_k.diff": torch.randn(inner, context),
        f"{unet}_norm.diff": torch.randn(inner),
        f"{unet}_norm.diff_b": torch.randn(inner),
        "lora_unet_conv_in.diff": torch.randn(32, 4, 3, 3) * 0.1,
    }
    return state


def test_full_differences_are_used_by_all(graph, model_folders, differences):
    """Our Apply, merged and exact, Load Files, and the stock loader make the same outputs of every key."""
    from personalize.nodes.apply import apply

    result = result_of(differences)
    save(result)
    assert same(load_file(model_folders["loras"] / "mine.safetensors"), differences)
    (theirs, their_clip), _ = stock(graph, differences)
    before = unet(graph[0]), words(graph[1])
    assert (unet(theirs) - before[0]).abs().max() > 0.05 and (words(their_clip) - before[1]).abs().max() > 0.05
    ways = {
        "apply": apply(*graph[:2], result),
        "exact": apply(*graph[:2], result, in_full_precision=True),
        "complete": load(graph, "mine.safetensors"),
        "lora": load(graph, lora="mine.safetensors"),
        "lora, exact": load(graph, lora="mine.safetensors", full_precision=True),
    }
    for name, (model, clip, *_) in ways.items():
        assert (unet(model) - unet(theirs)).abs().max() < 1e-4, name
        assert (words(clip) - words(their_clip)).abs().max() < 1e-2, name  # the host merges in half precision
    assert torch.equal(unet(graph[0]), before[0]) and torch.equal(words(graph[1]), before[1])


def test_exact_differences_are_the_formula(graph, differences):
    """Every difference, and half of it, in float64: what the module computes with after the host's casting."""
    from personalize.nodes.host import full_precision

    for name, value in differences.items():
        if name.endswith((".diff", ".diff_b")):
            weight = torch.randn(value.shape).half()
            expected = (weight.double() + 0.5 * value.double()).float()
            assert (full_precision.Difference(value, 0.5)(weight.float()) - expected).abs().max() < 1e-5


@pytest.mark.parametrize("key", range(11))
def test_every_difference_matters(graph, differences, key):
    """Each key alone of its layer changes the output of the exact path: none is passed over."""
    from personalize.nodes.apply import apply

    name = sorted(differences)[key]
    layer, _, part = name.partition(".")
    kept = {k: v for k, v in differences.items() if k == name or part[:4] != "diff" and k.startswith(f"{layer}.")}
    result = result_of(kept)
    model, clip = apply(*graph[:2], result, in_full_precision=True)
    moved = [(unet(model) - unet(graph[0])).abs().max(), (words(clip) - words(graph[1])).abs().max()]
    assert (moved[0] > 1e-3) == layer.startswith("lora_unet") and (moved[1] > 1e-3) == layer.startswith("lora_te")


WRONG = {
    "another shape": (
        {"lora_te_text_model_encoder_layers_0_mlp_fc1.diff": torch.ones(64, 256)},
        "does not have the shape",
    ),
    "another bias": ({"lora_te_text_model_encoder_layers_0_mlp_fc1.diff_b": torch.ones(64)}, "does not have the shape"),
    "no bias there": ({"lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_k.diff_b": torch.ones(128)},
                      "does not have the shape"),
    "flat convolution": ({"lora_unet_conv_in.diff": torch.ones(32, 36)}, "does not have the shape"),
    "one weight twice": (
        {f"lora_{te}_text_model_encoder_layers_0_mlp_fc1.diff": torch.ones(256, 64) for te in ("te", "te1")},
        "^Two learned layers name the same weight",
    ),
    "unknown": ({"lora_te_text_model_encoder_layers_9_mlp_fc1.diff": torch.ones(256, 64)}, "^1 of 1 learned layers"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_a_difference_that_does_not_fit_is_refused(graph, name):
    from personalize.nodes.apply import apply

    lora, sentence = WRONG[name]
    with pytest.raises(ValueError, match=sentence):
        apply(*graph[:2], result_of(lora))
