"""Full differences of weights and biases in a LoRA file: does every loader add all of them, and ours exactly?"""

import pytest
import torch
from safetensors.torch import load_file

from personalize.tests.support.saved import load, same, save, stock, unet, words
from personalize.trainers.runs.result import from_other_programs

pytestmark = pytest.mark.comfy
KINDS = ("SD 1.x", "SD 2.x v", "SDXL")


@pytest.fixture(scope="module", params=KINDS)
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def graph(tmp_path_factory, kind):
    """MODEL, CLIP, VAE of a random checkpoint."""
    from personalize.tests.support import random_sd

    return random_sd.graph(tmp_path_factory.mktemp("random"), kind)


def result_of(lora):
    return from_other_programs("theirs", lora, {}, {})


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


@pytest.mark.parametrize(
    ("kind", "full_precision"), [*((kind, False) for kind in KINDS), (KINDS[0], True)], indirect=["kind"]
)
def test_a_checkpoint_is_the_whole_model_with_what_was_learned(kind, graph, model_folders, differences, full_precision):
    """In the host's own names, and read by the host and by this pack as the models that it was saved of."""
    from personalize.nodes.apply import apply
    from personalize.nodes.host import session, weights
    from personalize.tests.support import random_sd
    from personalize.trainers.models.checkpoint import load_models

    result, vae = result_of(differences), graph[2]
    model, clip = apply(*graph[:2], result, in_full_precision=full_precision)
    said = str(save(result, model=model, clip=clip, vae=vae).ui.as_dict())
    assert "in loras and in personalize and in checkpoints" in said and "diffusers" not in said
    file = model_folders["checkpoints"] / "mine.safetensors"
    if not full_precision:  # with that the host's own saving fails
        with torch.inference_mode():
            theirs = graph[0].state_dict_for_saving(graph[1].state_dict_for_saving(), vae.get_sd())
        assert load_file(file).keys() ^ theirs.keys() <= {key for key in theirs if key.endswith("position_ids")}
    loaded = random_sd.load(file, kind)
    assert (unet(loaded[0]) - unet(model)).abs().max() < 0.02 < 0.05 < (unet(graph[0]) - unet(model)).abs().max()
    assert (words(loaded[1]) - words(clip)).abs().max() < 0.02
    ours = load_models(file, random_sd.layout(kind)[0], random_sd.HEADS)
    with session.training_session():
        of_graph = weights.read_models(weights.GraphModels.of(model, clip, vae), torch.float32)
    for name, value in of_graph.unet.state_dict().items():
        assert torch.allclose(ours.unet.state_dict()[name].float(), value, rtol=1e-3, atol=1e-4), name
    assert ours.prediction_type == of_graph.prediction_type


def test_save_says_which_program_does_not_read_whole_weights(graph, model_folders, differences):
    sentence = "diffusers cannot read this LoRA's whole weights: connect model, clip and vae for a checkpoint."
    assert sentence in str(save(result_of(differences)).ui.as_dict())
    assert "no checkpoint, which needs model, clip and vae." in str(
        save(result_of(differences), vae=graph[2]).ui.as_dict()
    )


def test_a_checkpoint_of_another_model_gets_another_name(graph, model_folders, differences):
    from personalize.nodes.apply import apply

    result = result_of(differences)
    for strength, name in ((1.0, "mine"), (0.5, "mine_2"), (1.0, "mine")):
        model, clip = apply(*graph[:2], result, strength, strength)
        assert save(result, model=model, clip=clip, vae=graph[2]).result[0] == f"{name}.safetensors"
