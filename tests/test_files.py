"""Files that come back, and files of other programs: does Load Personalized Files make of them what their makers do?

On random models of every kind, by the host's own forward passes; what diffusers writes is compared with diffusers.
"""

import dataclasses
import json
import types

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from personalize.trainers import run as runs
from personalize.trainers import training
from personalize.trainers.data import Concept
from personalize.trainers.recipes.textboost import TextBoost

pytestmark = pytest.mark.comfy
KINDS = ("SD 1.x", "SD 2.x v")
NODE = types.SimpleNamespace(unique_id="1")


@pytest.fixture(scope="module", params=KINDS)
def graph(tmp_path_factory, request):
    """MODEL, CLIP, VAE of a random checkpoint."""
    from personalize.tests import random_sd

    return random_sd.graph(tmp_path_factory.mktemp("random"), request.param)


@pytest.fixture(scope="module")
def trained(graph, tmp_path_factory):
    """The result of a short training with large steps, of text encoder and U-Net."""
    from personalize.nodes import host, weights

    recipe = TextBoost(
        steps=2, batch_size=2, views=4, lora_learning_rate=2e-2, unet_lora_rank=3, unet_lora_learning_rate=0.1
    )
    concept = Concept(images=(torch.rand(3, 64, 64),), resolution=64, placeholder_token="<thing>")
    with host.training_session():
        models = weights.read_models(*graph, torch.float32)
        return training.train(runs.Run(concept=concept, recipe=recipe), models, tmp_path_factory.mktemp("run"))


@pytest.fixture
def folders(tmp_path, monkeypatch):
    """{kind: folder} in place of the host's."""
    import folder_paths

    import personalize.nodes.files  # noqa: F401 - adds models/personalize

    made = {kind: tmp_path / "models" / kind for kind in ("loras", "embeddings", "personalize")}
    for kind, folder in made.items():
        folder.mkdir(parents=True)
        known = folder_paths.folder_names_and_paths[kind][1]
        monkeypatch.setitem(folder_paths.folder_names_and_paths, kind, ([str(folder)], known))
    monkeypatch.setattr(folder_paths, "filename_list_cache", {})
    return made


def save(result, name="mine", **options):
    from personalize.nodes.results import Save

    return Save.execute(result=result, name=name, overwrite=False, **options)


def load(graph, personalized="none", **inputs):
    """MODEL, CLIP and RESULT of the node."""
    from personalize.nodes.files import LoadFiles

    class Node(LoadFiles):
        hidden = NODE

    return Node.execute(model=graph[0], clip=graph[1], personalized=personalized, **inputs).result


def words(clip, prompt="a photo of a dog"):
    with torch.inference_mode():
        return clip.encode_from_tokens(clip.tokenize(prompt)).clone()


def unet(model):
    """The U-Net's output for inputs that are always the same."""
    import comfy.model_management as mm

    g = torch.Generator().manual_seed(1)
    context = torch.randn(2, 77, 64, generator=g)
    mm.load_models_gpu([model])
    with torch.inference_mode():
        latents = torch.randn(2, 4, 16, 16, generator=g)
        return model.model.diffusion_model(latents, torch.tensor([3, 801]), context=context).clone()


def encoder_of(clip):
    return clip.cond_stage_model.clip


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


def stock(graph, state):
    """MODEL and CLIP of the host's Load LoRA, and the keys that it used."""
    import comfy.lora
    import comfy.sd

    keys = comfy.lora.model_lora_keys_clip(
        graph[1].cond_stage_model, comfy.lora.model_lora_keys_unet(graph[0].model, {})
    )
    loaded = comfy.lora.load_lora(dict(state), keys, log_missing=True)
    used = {key for patch in loaded.values() for key in getattr(patch, "loaded_keys", ())}
    return comfy.sd.load_lora_for_models(*graph[:2], dict(state), 1.0, 1.0), used


# -- what this pack saves


def test_a_complete_file_comes_back_bit_for_bit(graph, trained, folders):
    from personalize.nodes import carry
    from personalize.nodes.apply import apply
    from personalize.trainers import export

    outputs = save(trained).result
    assert outputs == ("mine.safetensors", "embedding:mine")
    model, clip, result = load(graph, "mine.safetensors")
    assert same(result.lora, trained.lora)
    learned = [export.carried(each.tokens, each.fixed_outputs) for each in (result, trained)]
    assert same(*learned) and len(learned[0]) > 2
    for name in ("settings", "dataset", "history", "stop_reason", "seconds", "complete", "origin"):
        assert getattr(result, name) == getattr(trained, name)
    theirs = apply(*graph[:2], trained)
    prompt = "a photo of <thing>, <zoom-out>"
    assert torch.equal(words(clip, prompt), words(theirs[1], prompt))
    assert torch.equal(words(clip, ""), words(theirs[1], ""))
    assert torch.equal(unet(model), unet(theirs[0]))
    assert carry.of(clip).tokens.keys() == trained.tokens.keys()
    save(result, "again")
    for kind, folder in folders.items():
        assert same(load_file(folder / "again.safetensors"), load_file(folder / "mine.safetensors")), kind


def test_complete_can_be_switched_off(trained, folders):
    save(trained, complete=False)
    assert [kind for kind, folder in folders.items() if any(folder.iterdir())] == ["loras", "embeddings"]


def test_a_file_that_exists_stops_all_three(trained, folders):
    (folders["personalize"] / "mine.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match=r"^The file mine\.safetensors already exists in personalize: "):
        save(trained)
    assert not any(folders["loras"].iterdir()) and not any(folders["embeddings"].iterdir())


def test_words_alone_write_no_lora(graph, trained, folders):
    output = save(dataclasses.replace(trained, lora={}))
    assert output.result == ("", "embedding:mine") and not any(folders["loras"].iterdir())
    assert "no LoRA" in str(output.ui.as_dict())
    assert load(graph, "mine.safetensors")[2].lora == {}


def test_a_lora_alone_writes_no_embedding(graph, trained, folders):
    output = save(dataclasses.replace(trained, tokens={}, fixed_outputs=()))
    assert output.result == ("mine.safetensors", "") and not any(folders["embeddings"].iterdir())
    model, clip, result = load(graph, "mine.safetensors")
    assert same(result.lora, trained.lora) and result.tokens == {}
    assert (words(clip) - words(graph[1])).abs().max() > 0.05


def test_an_embedding_for_two_encoders_has_the_hosts_names(trained, folders):
    vectors = torch.randn(2, 8), torch.randn(2, 16)
    save(dataclasses.replace(trained, lora={}, tokens={"<thing>": vectors}), complete=False)
    state = load_file(folders["embeddings"] / "mine.safetensors")
    assert state.keys() == {"clip_l", "clip_g"}
    assert torch.equal(state["clip_l"], vectors[0]) and torch.equal(state["clip_g"], vectors[1])


def test_the_header_says_what_was_done(graph, trained, folders, request):
    save(trained)
    headers = {}
    for kind, folder in folders.items():
        with safe_open(folder / "mine.safetensors", "pt") as file:
            headers[kind] = file.metadata()
    version, architecture, v2 = {
        "SD 1.x": ("sd_v1", "stable-diffusion-v1", "False"),
        "SD 2.x v": ("sd_v2_v", "stable-diffusion-v2-768-v", "True"),
    }[request.node.callspec.params["graph"]]
    expected = {
        "ss_base_model_version": version,
        "ss_v2": v2,
        "ss_network_module": "networks.lora",
        "ss_network_dim": "4",
        "ss_network_alpha": "4.0",
        "ss_text_encoder_lr": "0.02",
        "ss_unet_lr": "0.1",
        "ss_optimizer": "torch.optim.adamw.AdamW(weight_decay=0.01)",
        "ss_max_train_steps": "2",
        "ss_steps": "2",
        "ss_total_batch_size": "2",
        "ss_num_train_images": "1",
        "ss_seed": "0",
        "ss_mixed_precision": "no",
        "ss_clip_skip": "None",
        "ss_resolution": "(64, 64)",
        "ss_output_name": "mine",
        "modelspec.trigger_phrase": "<thing>",
        "modelspec.architecture": f"{architecture}/lora",
    }
    assert {key: headers["loras"].get(key) for key in expected} == expected
    assert json.loads(headers["loras"]["ss_tag_frequency"]) == {"images": {"<thing>": 1}}
    assert headers["embeddings"]["modelspec.architecture"] == f"{architecture}/textual-inversion"
    assert "history" not in json.loads(headers["loras"]["personalize"])
    textual = dataclasses.replace(trained, lora={}).metadata()
    assert not {"ss_network_dim", "ss_text_encoder_lr", "ss_unet_lr"} & textual.keys()


def test_training_goes_on_from_a_loaded_word(graph, trained, folders):
    from personalize.nodes import host, weights

    save(trained)
    embedding = load(graph, embedding="mine.safetensors", placeholder_token="<mine>")
    for (model, clip, _), token in ((load(graph, "mine.safetensors"), "<thing>"), (embedding, "<mine>")):
        with host.training_session():
            models = weights.read_models(model, clip, graph[2], torch.float32)
        assert torch.equal(models.text_encoders[0].known_tokens[token], trained.tokens["<thing>"][0])


# -- full differences


@pytest.fixture
def differences(graph):
    """Full differences of weights and biases, and a LoRA with the difference of its bias; {name in a file: tensor}."""
    te = "lora_te_text_model_encoder_layers_0"
    unet = "lora_unet_down_blocks_0_attentions_0"
    state = {
        f"{te}_mlp_fc1.diff": torch.randn(256, 64) * 0.1,
        f"{te}_mlp_fc1.diff_b": torch.randn(256) * 0.1,
        f"{te}_mlp_fc2.diff_b": torch.randn(64) * 0.5,
        f"{te}_self_attn_q_proj.lora_down.weight": torch.randn(2, 64) * 0.3,
        f"{te}_self_attn_q_proj.lora_up.weight": torch.randn(64, 2) * 0.3,
        f"{te}_self_attn_q_proj.alpha": torch.tensor(1.0),
        f"{te}_self_attn_q_proj.diff_b": torch.randn(64) * 0.1,
        f"{unet}_transformer_blocks_0_attn2_to_k.diff": torch.randn(32, 64),
        f"{unet}_norm.diff": torch.randn(32),
        f"{unet}_norm.diff_b": torch.randn(32),
        "lora_unet_conv_in.diff": torch.randn(32, 4, 3, 3) * 0.1,
    }
    return state


def test_full_differences_are_used_by_all(graph, trained, folders, differences):
    """Our Apply, merged and exact, Load Files, and the stock loader make the same outputs of every key."""
    from personalize.nodes.apply import apply

    result = dataclasses.replace(trained, lora=differences, tokens={}, fixed_outputs=())
    save(result)
    assert same(load_file(folders["loras"] / "mine.safetensors"), differences)
    (theirs, their_clip), _ = stock(graph, differences)
    before = unet(graph[0]), words(graph[1])
    assert (unet(theirs) - before[0]).abs().max() > 0.05 and (words(their_clip) - before[1]).abs().max() > 0.05
    ways = {
        "apply": apply(*graph[:2], result),
        "exact": apply(*graph[:2], result, in_full_precision=True),
        "complete": load(graph, "mine.safetensors"),
        "lora": load(graph, lora="mine.safetensors"),
        "lora, exact": load(graph, lora="mine.safetensors", exact=True),
    }
    for name, (model, clip, *_) in ways.items():
        assert (unet(model) - unet(theirs)).abs().max() < 1e-4, name
        assert (words(clip) - words(their_clip)).abs().max() < 1e-2, name  # the host merges in half precision
    assert torch.equal(unet(graph[0]), before[0]) and torch.equal(words(graph[1]), before[1])


def test_exact_differences_are_the_formula(graph, trained, differences):
    """Every difference, and half of it, in float64: what the module computes with after the host's casting."""
    from personalize.nodes import exact

    for name, value in differences.items():
        if name.endswith((".diff", ".diff_b")):
            weight = torch.randn(value.shape).half()
            expected = (weight.double() + 0.5 * value.double()).float()
            assert (exact.Difference(value, 0.5)(weight.float()) - expected).abs().max() < 1e-5


@pytest.mark.parametrize("key", range(11))
def test_every_difference_matters(graph, trained, differences, key):
    """Each key alone of its layer changes the output of the exact path: none is passed over."""
    from personalize.nodes.apply import apply

    name = sorted(differences)[key]
    layer, _, part = name.partition(".")
    kept = {k: v for k, v in differences.items() if k == name or part[:4] != "diff" and k.startswith(f"{layer}.")}
    result = dataclasses.replace(trained, lora=kept, tokens={}, fixed_outputs=())
    model, clip = apply(*graph[:2], result, in_full_precision=True)
    moved = [(unet(model) - unet(graph[0])).abs().max(), (words(clip) - words(graph[1])).abs().max()]
    assert (moved[0] > 1e-3) == layer.startswith("lora_unet") and (moved[1] > 1e-3) == layer.startswith("lora_te")


WRONG = {
    "another shape": ({"lora_te_text_model_encoder_layers_0_mlp_fc1.diff": torch.ones(64, 256)}, "has not the shape"),
    "another bias": ({"lora_te_text_model_encoder_layers_0_mlp_fc1.diff_b": torch.ones(64)}, "has not the shape"),
    "no bias there": ({"lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_k.diff_b": torch.ones(128)},
                      "has not the shape"),
    "flat convolution": ({"lora_unet_conv_in.diff": torch.ones(32, 36)}, "has not the shape"),
    "unknown": ({"lora_te_text_model_encoder_layers_9_mlp_fc1.diff": torch.ones(256, 64)}, "^1 of 1 learned layers"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_a_difference_that_does_not_fit_is_refused(graph, trained, name):
    from personalize.nodes.apply import apply

    lora, sentence = WRONG[name]
    with pytest.raises(ValueError, match=sentence):
        apply(*graph[:2], dataclasses.replace(trained, lora=lora))
