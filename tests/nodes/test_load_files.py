"""Files that come back, and files of other programs: does Load Personalized Files make of them what their makers do?

On random models of every kind, by the host's own forward passes; what diffusers writes is compared with diffusers.
"""

import dataclasses
import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from personalize.tests.support import small
from personalize.tests.support.saved import load, same, save, unet, words
from personalize.trainers.data.concept import Concept
from personalize.trainers.recipes.textboost import TextBoost
from personalize.trainers.runs import train
from personalize.trainers.runs.run import Run

pytestmark = pytest.mark.comfy
KINDS = ("SD 1.x", "SD 2.x v", "SDXL")


@pytest.fixture(scope="module", params=KINDS)
def graph(tmp_path_factory, request):
    """MODEL, CLIP, VAE of a random checkpoint."""
    from personalize.tests.support import random_sd

    return random_sd.graph(tmp_path_factory.mktemp("random"), request.param)


@pytest.fixture(scope="module")
def trained(graph, tmp_path_factory):
    """The result of a short training with large steps, of text encoder and U-Net."""
    from personalize.nodes.host import session, weights

    recipe = TextBoost(
        steps=2, batch_size=2, views=4, lora_learning_rate=2e-2, unet_lora_rank=3, unet_lora_learning_rate=0.1,
        captions=small.CAPTIONS,
    )  # fmt: skip
    concept = Concept(images=(torch.rand(3, 64, 64),), resolution=64, placeholder_token="<thing>")
    with session.training_session():
        models = weights.read_models(weights.GraphModels.of(*graph), torch.float32)
        return train.train(Run(concept=concept, recipe=recipe), models, tmp_path_factory.mktemp("run"))


# -- what this pack saves


def test_a_complete_file_comes_back_bit_for_bit(graph, trained, model_folders):
    from personalize.nodes.apply import apply
    from personalize.nodes.host import clip_attachment

    outputs = save(trained).result
    assert outputs == ("mine.safetensors", "embedding:mine")
    model, clip, result = load(graph, "mine.safetensors")
    assert same(result.lora, trained.lora)
    learned = [each.learned() for each in (result, trained)]
    assert same(*learned) and len(learned[0]) > 2
    for name in ("settings", "dataset", "history", "stop_reason", "seconds", "complete", "origin"):
        assert getattr(result, name) == getattr(trained, name)
    theirs = apply(*graph[:2], trained)
    prompt = "a photo of <thing>, <zoom-out>"
    assert torch.equal(words(clip, prompt), words(theirs[1], prompt))
    assert torch.equal(words(clip, ""), words(theirs[1], ""))
    assert torch.equal(unet(model), unet(theirs[0]))
    assert clip_attachment.of(clip).tokens.keys() == trained.tokens.keys()
    save(result, "again")
    for kind in ("loras", "embeddings", "personalize"):
        again, first = (load_file(model_folders[kind] / f"{name}.safetensors") for name in ("again", "mine"))
        assert same(again, first), kind


def test_adapters_come_back_bit_for_bit_and_are_no_lora(graph, model_folders, tmp_path):
    """TextBoost++'s, of text encoder and U-Net; without the complete file the node says that they are lost."""
    from personalize.nodes.host import clip_attachment, session, weights
    from personalize.trainers.recipes.textboost_2026 import PLUS

    recipe = dataclasses.replace(PLUS, steps=2, batch_size=1, views=2, adapter_learning_rate=0.05)
    concept = Concept(images=(torch.rand(3, 64, 64),), resolution=64, placeholder_token="<thing>")
    with session.training_session():
        models = weights.read_models(weights.GraphModels.of(*graph), torch.float32)
        trained = train.train(Run(concept=concept, recipe=recipe), models, tmp_path)
    output = save(trained)
    assert output.result == ("", "embedding:mine") and "the adapters are in personalize" in str(output.ui.as_dict())
    _, clip, result = load(graph, "mine.safetensors")
    assert same(result.learned(), trained.learned()) and len(result.adapters) > 8 and not result.lora
    assert same(clip_attachment.of(clip).adapters["<thing>"].tensors, trained.adapters)
    lost = save(trained, "other", complete_file=False)
    assert "switch complete_file on to save the adapters" in str(lost.ui.as_dict())


def test_complete_can_be_switched_off(trained, model_folders):
    save(trained, complete_file=False)
    assert [kind for kind, folder in model_folders.items() if any(folder.iterdir())] == ["loras", "embeddings"]


def test_files_are_numbered_and_the_same_result_is_not_saved_twice(trained, model_folders):
    """One number for all three files, free in each of their folders."""
    (model_folders["personalize"] / "mine.safetensors").write_bytes(b"somebody's")
    (model_folders["loras"] / "mine_2.safetensors").write_bytes(b"somebody's")
    for _ in range(2):  # the second finds the first one's
        assert save(trained).result == ("mine_3.safetensors", "embedding:mine_3")
    other = dataclasses.replace(trained, settings={**trained.settings, "seed": 1234})
    assert save(other).result == ("mine_4.safetensors", "embedding:mine_4")
    names = {kind: sorted(file.name for file in folder.iterdir()) for kind, folder in model_folders.items()}
    assert names == {
        "loras": ["mine_2.safetensors", "mine_3.safetensors", "mine_4.safetensors"],
        "embeddings": ["mine_3.safetensors", "mine_4.safetensors"],
        "personalize": ["mine.safetensors", "mine_3.safetensors", "mine_4.safetensors"],
        "checkpoints": [],
    }
    assert (model_folders["loras"] / "mine_2.safetensors").read_bytes() == b"somebody's"


def test_words_alone_write_no_lora(graph, trained, model_folders):
    output = save(dataclasses.replace(trained, lora={}))
    assert output.result == ("", "embedding:mine") and not any(model_folders["loras"].iterdir())
    assert "no LoRA" in str(output.ui.as_dict())
    assert load(graph, "mine.safetensors")[2].lora == {}


def test_a_lora_alone_writes_no_embedding(graph, trained, model_folders):
    output = save(dataclasses.replace(trained, tokens={}, fixed_outputs=()))
    assert output.result == ("mine.safetensors", "") and not any(model_folders["embeddings"].iterdir())
    model, clip, result = load(graph, "mine.safetensors")
    assert same(result.lora, trained.lora) and result.tokens == {}
    assert (words(clip) - words(graph[1])).abs().max() > 0.05


def test_an_embedding_for_two_encoders_has_the_hosts_names(trained, model_folders):
    vectors = torch.randn(2, 8), torch.randn(2, 16)
    save(dataclasses.replace(trained, lora={}, tokens={"<thing>": vectors}), complete_file=False)
    state = load_file(model_folders["embeddings"] / "mine.safetensors")
    assert state.keys() == {"clip_l", "clip_g"}
    assert torch.equal(state["clip_l"], vectors[0]) and torch.equal(state["clip_g"], vectors[1])


def test_the_header_says_what_was_done(graph, trained, model_folders, request):
    save(trained)
    headers = {}
    for kind in ("loras", "embeddings", "personalize"):
        with safe_open(model_folders[kind] / "mine.safetensors", "pt") as file:
            headers[kind] = file.metadata()
    version, architecture, v2 = {
        "SD 1.x": ("sd_v1", "stable-diffusion-v1", "False"),
        "SD 2.x v": ("sd_v2_v", "stable-diffusion-v2-768-v", "True"),
        "SDXL": ("sdxl_base_v1-0", "stable-diffusion-xl-v1-base", "False"),
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
    assert json.loads(headers["loras"]["ss_tag_frequency"]) == {"1_<thing>": {"<thing>": 1}}
    assert json.loads(headers["loras"]["ss_dataset_dirs"]) == {"1_<thing>": {"n_repeats": 1, "img_count": 1}}
    assert "ss_network_module" not in headers["embeddings"], "an embedding would be shown as a LoRA"
    assert headers["embeddings"]["modelspec.architecture"] == f"{architecture}/textual-inversion"
    assert "history" not in json.loads(headers["loras"]["personalize"])
    textual = dataclasses.replace(trained, lora={}).metadata()
    assert not {"ss_network_dim", "ss_text_encoder_lr", "ss_unet_lr"} & textual.keys()


def test_training_goes_on_from_a_loaded_word(graph, trained, model_folders):
    from personalize.nodes.host import session, weights

    save(trained)
    embedding = load(graph, embedding="mine.safetensors", placeholder_token="<mine>")
    for (model, clip, _), token in ((load(graph, "mine.safetensors"), "<thing>"), (embedding, "<mine>")):
        with session.training_session():
            models = weights.read_models(weights.GraphModels.of(model, clip, graph[2]), torch.float32)
        assert torch.equal(models.text_encoders[0].known_tokens[token], trained.tokens["<thing>"][0])
