"""DINO and LPIPS by name: read from the allowed folders only, scores equal to the libraries' own, one sentence else.

Weights are random and small. LPIPS needs its package; without it a report says so.
"""

import json
import os
import shutil
import socket
import time
from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from personalize.trainers.metrics import dino, lpips, metrics
from personalize.trainers.metrics.dino import DinoConfig
from personalize.trainers.metrics.extractor_cache import ExtractorCache
from personalize.trainers.metrics.lpips import LpipsConfig

timm = pytest.importorskip("timm")
NAME = "test_vit"
TIMM = DinoConfig(dino_model=NAME, dino_weights="dino.safetensors")


@pytest.fixture(scope="module")
def pictures():
    dice = np.random.default_rng(0)
    sizes = [(40, 60), (160, 160), (200, 170), (90, 90)]
    return [Image.fromarray(dice.integers(0, 255, (*size, 3), "uint8")) for size in sizes]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A timm file and a transformers folder, with random weights."""
    from transformers import BitImageProcessor, Dinov2Config, Dinov2Model

    place = tmp_path_factory.mktemp("clip_vision")
    torch.manual_seed(0)
    save_file(timm.create_model(NAME, num_classes=0).state_dict(), place / "dino.safetensors")
    config = Dinov2Config(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=14)
    Dinov2Model(config).save_pretrained(place / "dinov2")
    size = {"size": {"shortest_edge": 32}, "crop_size": {"height": 28, "width": 28}}
    BitImageProcessor(**size).save_pretrained(place / "dinov2")
    return place


@pytest.fixture
def shelf(folder, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    return ExtractorCache(folders=lambda: [folder, tmp_path])


def cosines(vectors):
    """Of every vector to the first two, in float64; their mean with nothing below 0."""
    unit = [vector.double() / vector.double().square().sum().sqrt() for vector in vectors]
    return [sum(max(0.0, float(one @ other)) for other in unit[:2]) / 2 for one in unit]


@torch.no_grad()
def test_a_timm_file_scores_as_timm_does(shelf, folder, pictures):
    """timm's own loader and preprocessing, image by image."""
    model = timm.create_model(NAME, num_classes=0, checkpoint_path=str(folder / "dino.safetensors")).eval()
    transform = timm.data.create_transform(**timm.data.resolve_data_config(model=model))
    expected = cosines([model(transform(picture)[None])[0] for picture in pictures])
    scores = metrics.dino(shelf.load(TIMM), pictures, pictures[:2])
    assert scores.tolist() == pytest.approx(expected, abs=1e-5) and max(expected) - min(expected) > 1e-3


def resized(picture, height, width):
    """uint8 of shape (3, height, width), by what transformers resizes with: torchvision; before version 5, Pillow."""
    import transformers
    from torchvision.transforms import InterpolationMode
    from torchvision.transforms.v2.functional import pil_to_tensor, resize

    if transformers.__version__ < "5":
        return pil_to_tensor(picture.resize((width, height), Image.Resampling.BICUBIC))
    return resize(pil_to_tensor(picture), [height, width], InterpolationMode.BICUBIC, antialias=True)


@torch.no_grad()
def test_a_transformers_folder_scores_as_transformers_does(shelf, folder, pictures):
    """The class token, with what the library's processor does written out: size, crop, scale, mean, deviation."""
    from transformers import Dinov2Model

    model = Dinov2Model.from_pretrained(folder / "dinov2").eval()
    about = json.loads((folder / "dinov2" / "preprocessor_config.json").read_text())
    mean, std = (torch.tensor(about[name])[:, None, None] for name in ("image_mean", "image_std"))
    vectors = []
    for picture in pictures:
        scale = 32 / min(picture.size)
        height, width = (max(32, int(length * scale)) for length in reversed(picture.size))
        pixels = resized(picture, height, width)
        top, left = (height - 28) // 2, (width - 28) // 2
        pixels = pixels[:, top : top + 28, left : left + 28].float() / 255
        vectors.append(model(((pixels - mean) / std)[None]).last_hidden_state[0, 0])
    scores = metrics.dino(shelf.load(DinoConfig(dino_weights="dinov2")), pictures, pictures[:2])
    assert scores.tolist() == pytest.approx(cosines(vectors), abs=1e-5)


def test_loaded_once_waiting_on_the_cpu(shelf):
    first = shelf.load(TIMM)
    assert shelf.load(replace(TIMM, dino_download=True)) is first and first.name == "dino.safetensors"
    assert not any(p.requires_grad or p.is_inference() for p in first.module.parameters())
    with shelf.on("meta", TIMM) as lent:
        assert next(lent.module.parameters()).device.type == "meta"
        lent.module.to_empty(device="cpu")  # nothing comes back from there


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"dino_weights": "none.safetensors"}, "There are no DINO weights 'none.safetensors'"),
        ({"dino_weights": "../dino.safetensors"}, "is not a name of DINO weights"),
        ({"dino_weights": "/etc/passwd"}, "is not a name of DINO weights"),
        ({"dino_weights": "old.pt"}, "are not a .safetensors file"),
        ({"dino_model": "test_vti"}, "The DINO 'test_vti' is not a model of timm.*such as.*test_vit"),
        ({"dino_model": "facebook/dinov2-large"}, "is not a model of timm"),
        ({"dino_weights": "empty"}, "lacks config.json and preprocessor_config.json and model.safetensors"),
        ({"dino_weights": "odd"}, "The config.json of 'odd' does not describe a model"),
        ({"dino_weights": ""}, "are not on this computer, and dino_download is off"),
        ({"dino_weights": "", "dino_model": "facebook/dinov2-large"}, "are not on this computer"),
        ({"dino_weights": "", "dino_model": "https://a/b"}, "has no weights published by timm"),
        ({"dino_weights": "", "dino_model": "../a"}, "has no weights published by timm"),
        ({"dino_weights": "", "dino_model": "none", "dino_download": True}, "has no weights published by timm"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_read(shelf, tmp_path, changes, words):
    (tmp_path / "old.pt").write_bytes(b"no pickle is opened")
    (tmp_path / "empty").mkdir()
    (tmp_path / "odd").mkdir()
    for part in dino.PARTS:
        (tmp_path / "odd" / part).write_text("[]")
    with pytest.raises(ValueError, match=words) as caught:
        shelf.check(replace(TIMM, **changes))
    assert "\n" not in str(caught.value) and str(tmp_path) not in str(caught.value)


@pytest.mark.parametrize("download", [False, True])
@pytest.mark.parametrize("model", ["vit_small_patch16_224.dino", "facebook/dinov2-large"])
def test_only_a_choice_that_says_so_asks_the_network(shelf, monkeypatch, model, download):
    asked = []

    def no_network(*address, **options):
        asked.append(address)
        raise OSError("no network in this test")

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr(socket, "getaddrinfo", no_network)
    monkeypatch.setattr(socket, "create_connection", no_network)
    monkeypatch.setattr(time, "sleep", lambda seconds: None)  # between the hub's attempts
    choice = DinoConfig(dino_model=model, dino_download=download)
    words = "could not be downloaded: check the connection" if download else "dino_download is off: turn it on"
    with pytest.raises(ValueError, match=words):
        shelf.load(choice)
    assert bool(asked) is download


def test_a_folder_is_read_without_the_network(shelf, monkeypatch):
    monkeypatch.setattr(socket, "getaddrinfo", lambda *address, **options: pytest.fail("asked"))
    assert shelf.load(DinoConfig(dino_weights="dinov2")).module


def test_weights_of_another_model_are_refused(shelf, folder, tmp_path):
    """Also a transformers folder that lacks some, which the library would make up, with a warning."""
    from safetensors.torch import load_file

    shutil.copytree(folder / "dinov2", tmp_path / "partial")
    state = load_file(tmp_path / "partial" / "model.safetensors")
    save_file({k: v for k, v in state.items() if "layer.1" not in k}, tmp_path / "partial" / "model.safetensors")
    (tmp_path / "cut.safetensors").write_bytes((folder / "dino.safetensors").read_bytes()[:900])
    for choice, words in (
        (replace(TIMM, dino_model="test_convnext"), "are not those of 'test_convnext'"),
        (DinoConfig(dino_weights="partial"), "are not those of their folder"),
        (replace(TIMM, dino_weights="cut.safetensors"), "cannot be read|are not those"),
    ):
        with pytest.raises(ValueError, match=words) as caught:
            shelf.load(choice)
        assert "\n" not in str(caught.value) and str(tmp_path) not in str(caught.value)


def test_a_folder_with_code_of_its_own_is_not_run(shelf, folder, tmp_path):
    place = shutil.copytree(folder / "dinov2", tmp_path / "own")
    (place / "own.py").write_text(f"import os\nos.mkdir({str(tmp_path / 'hit')!r})\nclass M: pass\n")
    config = json.loads((place / "config.json").read_text()) | {"model_type": "own", "auto_map": {"AutoModel": "own.M"}}
    config |= {"auto_map": {"AutoConfig": "own.M", "AutoModel": "own.M"}}
    (place / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="The model in 'own' is 'own', which is not known as an image encoder: use"):
        shelf.load(DinoConfig(dino_weights="own"))
    (place / "config.json").write_text(json.dumps(config | {"model_type": "dinov2"}))
    with pytest.raises(ValueError, match="'own' asks for more than the folder holds, by 'auto_map'"):
        shelf.load(DinoConfig(dino_weights="own"))
    assert not os.path.exists(tmp_path / "hit")


@pytest.mark.parametrize(
    "more",
    [
        {"model_type": "timm_wrapper"},
        {"model_type": "upernet", "backbone": "owner/model", "use_pretrained_backbone": True},
        {"backbone": "owner/model", "use_pretrained_backbone": True},
        {"quantization_config": {"quant_method": "fp8"}},
        {"_attn_implementation": "owner/kernel"},
        {"attn_implementation": "owner/kernel"},
    ],
    ids=str,
)
def test_a_folder_that_leads_to_the_network_is_refused_before_it_is_read(folder, tmp_path, more, monkeypatch):
    """The settings of a stranger's folder may name repositories, which transformers would ask the hub for."""
    place = shutil.copytree(folder / "dinov2", tmp_path / "theirs")
    config = json.loads((place / "config.json").read_text()) | more
    (place / "config.json").write_text(json.dumps(config))
    monkeypatch.setattr(dino, "load_image_encoder", lambda *given: pytest.fail("it was read"))
    for act in (DinoConfig(dino_weights="theirs").check, DinoConfig(dino_weights="theirs").read):
        with pytest.raises(ValueError, match="not known as an image encoder|asks for more than the folder holds"):
            act([tmp_path])


def test_without_the_package_or_its_weights_it_says_why(shelf, tmp_path, monkeypatch):
    monkeypatch.setattr(lpips.importlib.util, "find_spec", lambda name: None)
    assert LpipsConfig().missing([tmp_path]) == "the package lpips is not installed"
    monkeypatch.setattr(lpips.importlib.util, "find_spec", lambda name: name)
    why = LpipsConfig().missing([tmp_path])
    assert why.startswith("There are no LPIPS weights 'lpips_alex.safetensors' below models/clip_vision")
    with pytest.raises(ValueError, match="LPIPS cannot be measured: There are no LPIPS weights"):
        shelf.load(LpipsConfig())


@pytest.fixture
def alex(tmp_path):
    """The package's own model with random weights, and its file."""
    lpips = pytest.importorskip("lpips")
    torch.manual_seed(0)
    model = lpips.LPIPS(net="alex", pretrained=False, pnet_rand=True, verbose=False).eval()
    with torch.no_grad():
        for layer in model.lins:
            layer.model[1].weight.abs_()  # as the published ones: distances are not negative
    state = {k: v.contiguous() for k, v in model.state_dict().items() if not k.startswith("lins.")}
    save_file(state, tmp_path / "lpips_alex.safetensors")
    return model


@torch.no_grad()
def test_diversity_is_the_mean_of_the_packages_own_distances(shelf, alex):
    dice = np.random.default_rng(1)
    pictures = [Image.fromarray(dice.integers(0, 255, (64, 96, 3), "uint8")) for _ in range(4)]
    scaled = [torch.from_numpy(np.array(p)).permute(2, 0, 1)[None].float() / 127.5 - 1 for p in pictures]
    expected = [float(alex(one, other)) for one, other in combinations(scaled, 2)]
    assert metrics.diversity(shelf.load(LpipsConfig()), pictures) == pytest.approx(np.mean(expected), abs=1e-5)
    assert len(expected) == 6 and max(expected) - min(expected) > 1e-6


def test_another_file_is_no_lpips(shelf, alex, folder, tmp_path):
    for file in ("dino.safetensors", "cut.safetensors"):
        (tmp_path / "cut.safetensors").write_bytes((folder / "dino.safetensors").read_bytes()[:900])
        with pytest.raises(ValueError, match="are not those of LPIPS|cannot be read"):
            shelf.load(LpipsConfig(lpips_weights=file))


def test_diversity_by_features_is_one_minus_the_cosine(shelf, pictures):
    encoder = shelf.load(TIMM)
    unit = metrics.unit_features(encoder.image_features, pictures[:3]).double()
    expected = [1 - float(one @ other) for one, other in combinations(unit, 2)]
    measure = metrics.feature_distances(encoder)
    assert metrics.diversity(measure, pictures[:3]) == pytest.approx(sum(expected) / 3, abs=1e-6)
    assert measure.name == "1 - cosine, dino.safetensors" and metrics.diversity(measure, pictures[:1]) is None
