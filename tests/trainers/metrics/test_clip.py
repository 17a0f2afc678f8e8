"""CLIPs by name: are they read from the allowed folders only, exactly, never unpickled, and are refusals sentences?

The demo's CLIP goes the way that users' files go. Features are compared with open_clip's own.
"""

import contextlib
import json
import logging
import os
import shutil
import socket
import time
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from personalize.demo import evaluators
from personalize.tests.support import evaluating, world_clip
from personalize.trainers.metrics import feature_extractors
from personalize.trainers.metrics.clip import CONFIG, ClipConfig, _find
from personalize.trainers.metrics.extractor_cache import ExtractorCache
from personalize.trainers.settings import part

open_clip = pytest.importorskip("open_clip")
PROMPTS = ["a dog", "a red cat in the snow", "", "two houses and a very long row of words " * 9]


@pytest.fixture(scope="module")
def theirs(shelf, folder):
    """open_clip's own model from the same file."""
    model, _, preprocess = open_clip.create_model_and_transforms(
        evaluators.CLIP_NAME, pretrained=str(folder / world_clip.FILE)
    )
    return model.eval(), preprocess


class Bomb:
    """Unpickled, it leaves a trace."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


@torch.no_grad()
def test_features_are_those_of_open_clip(shelf, theirs):
    (model, preprocess), pictures = theirs, world_clip.pictures()
    clip = shelf.load(world_clip.CHOICE)
    expected = model.encode_image(torch.stack([preprocess(picture) for picture in pictures]))
    torch.testing.assert_close(clip.image_features(pictures), expected, atol=1e-6, rtol=0)
    ids = open_clip.get_tokenizer(evaluators.CLIP_NAME)(PROMPTS)
    torch.testing.assert_close(clip.text_features(PROMPTS), model.encode_text(ids), atol=1e-5, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("prompts", [PROMPTS, PROMPTS[:1], PROMPTS[1:3]])
def test_without_padding_the_features_are_the_same(theirs, prompts):
    model = theirs[0]
    seen = []
    hook = model.transformer.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].shape))
    ids = open_clip.get_tokenizer(evaluators.CLIP_NAME)(prompts)
    short, whole = feature_extractors.encode_text(model, ids), model.encode_text(ids)
    hook.remove()
    torch.testing.assert_close(short, whole, atol=1e-5, rtol=1e-5)
    longest = max(len(row[: row.argmax() + 1]) for row in ids)
    assert longest in seen[0] and ids.shape[1] in seen[1]
    assert model.positional_embedding.shape[0] == ids.shape[1]  # as it was
    assert model.attn_mask.shape == (ids.shape[1], ids.shape[1])


@torch.no_grad()
def test_a_text_tower_that_looks_ahead_gets_the_whole(theirs):
    """Where the mask is not causal, or the feature is read elsewhere, padding counts."""
    config = json.loads(evaluators.CLIP_CONFIG.read_text())
    config["text_cfg"] |= {"no_causal_mask": True}
    torch.manual_seed(0)
    looks_ahead = open_clip.CLIP(**config).eval()
    reads_last = open_clip.CLIP(**config | {"text_cfg": config["text_cfg"] | {"pool_type": "last"}}).eval()
    separate = open_clip.CustomTextCLIP(**json.loads(evaluators.CLIP_CONFIG.read_text())).eval()
    ids = open_clip.get_tokenizer(evaluators.CLIP_NAME)(PROMPTS[:2])
    for model in (looks_ahead, reads_last, separate):
        assert torch.equal(feature_extractors.encode_text(model, ids), model.encode_text(ids))


def test_a_folder_of_open_clip_is_read_too(shelf, folder, tmp_path):
    place = open_clip_folder(tmp_path / "CLIPs" / "world", folder)
    torch.save(Bomb(tmp_path / "hit"), place / "open_clip_pytorch_model.bin")
    found = ExtractorCache(folders=lambda: [tmp_path / "other", tmp_path / "CLIPs"])
    clip = found.load(ClipConfig(clip_model="whatever", clip_weights="world"))
    assert not (tmp_path / "hit").exists()
    pictures = world_clip.pictures()
    assert torch.equal(clip.image_features(pictures), shelf.load(world_clip.CHOICE).image_features(pictures))
    assert torch.equal(clip.text_features(PROMPTS[:2]), shelf.load(world_clip.CHOICE).text_features(PROMPTS[:2]))


def open_clip_folder(place, folder, **config):
    place.mkdir(parents=True)
    shutil.copy(folder / world_clip.FILE, place / "weights.safetensors")
    model = json.loads(evaluators.CLIP_CONFIG.read_text()) | config
    (place / CONFIG).write_text(json.dumps({"model_cfg": model, "preprocess_cfg": {}}))
    return place


def test_each_is_loaded_once_and_can_be_forgotten(folder):
    shelf = ExtractorCache(folders=lambda: [folder])
    first = shelf.load(world_clip.CHOICE)
    with shelf.on("meta", world_clip.CHOICE) as lent:
        assert lent is first and lent.module.logit_scale.device.type == "meta"
        lent.module.to_empty(device="cpu")  # nothing comes back from there
    assert shelf.load(replace(world_clip.CHOICE, clip_download=True)) is first
    shelf.clear()
    assert shelf.load(world_clip.CHOICE) is not first


def test_it_waits_on_the_cpu_even_after_an_error(shelf):
    with pytest.raises(KeyError), shelf.on("cpu", world_clip.CHOICE) as clip:
        clip.module.half()
        raise KeyError
    assert {p.device.type for p in shelf.load(world_clip.CHOICE).module.parameters()} == {"cpu"}
    shelf.clear()


def test_where_the_device_has_no_room_it_stays(shelf):
    with shelf.on("cuda" if not torch.cuda.is_available() else "cuda:99", world_clip.CHOICE) as clip:
        assert clip.module.logit_scale.device.type == "cpu"


@torch.no_grad()
def test_loaded_in_inference_mode_it_serves_outside(folder):
    with torch.inference_mode():
        clip = ExtractorCache(folders=lambda: [folder]).load(world_clip.CHOICE)
    assert not any(p.is_inference() or p.requires_grad for p in clip.module.parameters())


def test_nothing_is_said_about_random_weights_and_paths(shelf, folder, tmp_path, caplog):
    ExtractorCache(folders=lambda: [folder]).load(world_clip.CHOICE)
    evaluating.write_for_server(tmp_path)
    ExtractorCache(folders=lambda: [tmp_path]).load(ClipConfig(clip_weights="world"))
    assert not caplog.text
    logging.warning("initialized randomly")
    assert "random" in caplog.text  # and other words are heard again


def refusal(shelf, choice, early):
    """The sentence; `early` where names and folders tell already."""
    with pytest.raises(ValueError) as caught:
        (shelf.check if early else shelf.load)(choice)
    if early:
        with pytest.raises(ValueError):
            shelf.load(choice)
    else:
        shelf.check(choice)
    sentence = str(caught.value)
    assert "\n" not in sentence and sentence.endswith((".", ").")) and len(sentence) < 300
    return sentence


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"clip_weights": "missing.safetensors"}, "There are no CLIP weights 'missing.safetensors'"),
        ({"clip_weights": "../world.safetensors"}, "is not a name of CLIP weights"),
        ({"clip_weights": "a/..\\world.safetensors"}, "is not a name of CLIP weights"),
        ({"clip_weights": "/etc/passwd"}, "is not a name of CLIP weights"),
        ({"clip_weights": "C:\\clip.safetensors"}, "is not a name of CLIP weights"),
        ({"clip_weights": "a\0b"}, "is not a name of CLIP weights"),
        ({"clip_weights": "bomb.pt"}, "are not a .safetensors file"),
        ({"clip_weights": "empty"}, "has no .safetensors file"),
        ({"clip_weights": "no_config"}, "has no open_clip_config.json"),
        ({"clip_weights": "from_hub"}, "parts that are not in its own file"),
        ({"clip_model": "ViT-B32"}, "The CLIP 'ViT-B32' is not a model of open_clip: write a name such as ViT-B-32"),
        ({"clip_model": "local-dir:/etc", "clip_weights": ""}, "is not a model of open_clip"),
        ({"clip_model": "hf-hub:org/name", "clip_weights": ""}, "is not a model of open_clip"),
        ({"clip_model": "ViT-B-16-SigLIP"}, "parts that are not in its own file"),
        ({"clip_model": "ViT-H-14", "clip_weights": ""}, "The CLIP ViT-H-14 has no weights published by OpenAI"),
        ({"clip_model": "ViT-H-14", "clip_weights": "", "clip_download": True}, "has no weights published by OpenAI"),
        ({"clip_model": "ViT-B-32", "clip_weights": ""}, "are not on this computer, and clip_download is off"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_read(shelf, folder, tmp_path, monkeypatch, changes, words):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    torch.save(Bomb(tmp_path / "hit"), tmp_path / "bomb.pt")
    open_clip_folder(tmp_path / "empty", folder)
    (tmp_path / "empty" / "weights.safetensors").rename(tmp_path / "empty" / "weights.bin")
    (tmp_path / "no_config").mkdir()
    vision = {"image_size": 128, "timm_model_name": "hf-hub:org/name"}
    open_clip_folder(tmp_path / "from_hub", folder, vision_cfg=vision)
    both = ExtractorCache(folders=lambda: [folder, tmp_path])
    assert words in refusal(both, replace(world_clip.CHOICE, **changes), early=True)
    assert not (tmp_path / "hit").exists()


def test_weights_of_another_model_are_refused(shelf, folder, tmp_path):
    """Also those that open_clip would stretch: another image size, another context length."""
    config = json.loads(evaluators.CLIP_CONFIG.read_text())
    state = load_file(folder / world_clip.FILE)
    save_file({"vision_model.weight": torch.zeros(3)}, tmp_path / "vision.safetensors")
    state["positional_embedding"] = state["positional_embedding"].repeat(2, 1)[:77].contiguous()
    save_file(state, tmp_path / "longer.safetensors")
    (tmp_path / "cut.safetensors").write_bytes((folder / world_clip.FILE).read_bytes()[:9000])
    open_clip_folder(tmp_path / "odd", folder, embed_dim=64)
    open_clip_folder(tmp_path / "mad", folder, text_cfg=config["text_cfg"] | {"heads": 7})
    found = ExtractorCache(folders=lambda: [folder, tmp_path])
    for changes, words in (
        ({"clip_model": "ViT-B-32"}, "'world.safetensors' are not those of ViT-B-32"),
        ({"clip_weights": "vision.safetensors"}, "are not those of demo_world_clip"),
        ({"clip_weights": "longer.safetensors"}, "are not those of demo_world_clip"),
        ({"clip_weights": "cut.safetensors"}, "cannot be read (its contents are damaged)"),
        ({"clip_weights": "odd"}, "are not those of the model of its folder"),
        ({"clip_weights": "mad"}, "are not those of the model of its folder"),
    ):
        assert words in refusal(found, replace(world_clip.CHOICE, **changes), early=False)


def test_published_weights_are_found_where_the_hub_keeps_them(tmp_path, monkeypatch):
    """Without asking the network; and OpenAI's models need the quick GELU, whatever the architecture's name says."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    kept = tmp_path / "models--timm--vit_base_patch32_clip_224.openai"
    (kept / "snapshots" / "abc").mkdir(parents=True)
    (kept / "refs").mkdir()
    (kept / "refs" / "main").write_text("abc")
    save_file({"x": torch.zeros(1)}, kept / "snapshots" / "abc" / "open_clip_model.safetensors")
    found = _find(ClipConfig(), [])
    assert found.weights.read_bytes() and found.quick_gelu and found.name == "ViT-B-32"
    with pytest.raises(ValueError, match="'open_clip_model.safetensors' are not those of ViT-B-32"):
        ExtractorCache().load(ClipConfig())


@pytest.mark.parametrize("download", [False, True])
def test_only_a_choice_that_says_so_asks_the_network(tmp_path, monkeypatch, download):
    asked = []

    def no_network(*address, **options):
        asked.append(address)
        raise OSError("no network in this test")

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr(socket, "getaddrinfo", no_network)
    monkeypatch.setattr(socket, "create_connection", no_network)
    monkeypatch.setattr(time, "sleep", lambda seconds: None)  # between the hub's attempts
    choice = ClipConfig(clip_download=download)
    words = "could not be downloaded: check the connection" if download else "clip_download is off: turn it on"
    with pytest.raises(ValueError, match=words):
        ExtractorCache().load(choice)
    assert bool(asked) is download
    asked.clear()
    with pytest.raises(ValueError) if not download else contextlib.nullcontext():
        ExtractorCache().check(choice)  # a look asks nobody
    assert not asked


def test_quick_gelu_reaches_the_model(folder):
    plain, quick = (
        feature_extractors.load_clip(evaluators.CLIP_NAME, folder / world_clip.FILE, quick_gelu=q) for q in (0, 1)
    )
    with torch.no_grad():
        assert not torch.allclose(plain.text_features(["a dog"]), quick.text_features(["a dog"]), atol=1e-4)


def test_a_choice_is_part_of_other_settings():
    from personalize.trainers.stopping.clip_early_stopping import ClipEarlyStopping

    assert part(
        ClipConfig, ClipEarlyStopping(clip_model="ViT-L-14", clip_weights="a", clip_download=True)
    ) == ClipConfig(clip_model="ViT-L-14", clip_weights="a", clip_download=True)
