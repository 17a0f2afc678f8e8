"""Are our scores exactly what the libraries' own pipelines give, and are the demo's metric models loaded alike?

Backbones are randomly initialised and small, so nothing is downloaded; every comparison is to 1e-5 on the CPU.
"""

import json
import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from personalize.trainers.evaluation.scorer import REFERENCE_SCORES, ScorerConfig
from personalize.trainers.metrics.extractor_cache import ExtractorCache
from personalize.trainers.metrics.feature_extractors import FeatureExtractor, load_clip, load_image_encoder
from personalize.trainers.metrics.metrics import clip_image, clip_text, dino, image_similarity, plain_prompt

TINY_CLIP = {
    "embed_dim": 24,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
}


@pytest.fixture(scope="module")
def pictures():
    """Noise of several sizes and one with an alpha channel: the preprocessing matters."""
    dice = np.random.default_rng(0)
    sizes = [(40, 60), (32, 32), (70, 50)]
    plain = [Image.fromarray(dice.integers(0, 255, (*size, 3), "uint8")) for size in sizes]
    return [*plain, Image.fromarray(dice.integers(0, 255, (48, 48, 4), "uint8"))]


@pytest.fixture(scope="module")
def clip_file(tmp_path_factory):
    """A random open_clip model's name and weight file."""
    open_clip = pytest.importorskip("open_clip")
    from safetensors.torch import save_file

    folder = tmp_path_factory.mktemp("clip")
    (folder / "test_tiny_clip.json").write_text(json.dumps(TINY_CLIP))
    open_clip.add_model_config(folder / "test_tiny_clip.json")
    torch.manual_seed(0)
    state = open_clip.create_model("test_tiny_clip", load_weights=False).state_dict()
    save_file({name: value.contiguous() for name, value in state.items()}, folder / "clip.safetensors")
    return "test_tiny_clip", folder / "clip.safetensors"


@pytest.fixture(scope="module")
def reference_clip(clip_file):
    """The library's own pipeline on the same file: image or text -> unit feature in float64."""
    import open_clip

    name, path = clip_file
    model, _, preprocess = open_clip.create_model_and_transforms(name, pretrained=str(path))
    model, tokenize = model.eval(), open_clip.get_tokenizer(name)

    def image(picture):
        with torch.no_grad():
            return unit(model.encode_image(preprocess(picture.convert("RGB"))[None])[0])

    def text(prompt):
        with torch.no_grad():
            return unit(model.encode_text(tokenize([prompt]))[0])

    return image, text


def unit(vector):
    vector = vector.double()
    return vector / vector.square().sum().sqrt()


def test_clip_text_is_the_cosine_of_image_and_prompt(clip_file, reference_clip, pictures):
    image, text = reference_clip
    prompts = ["a dog", "a red cat in the snow", "", "two houses"]
    scores = clip_text(load_clip(*clip_file), pictures, prompts)
    expected = [float(image(i) @ text(p)) for i, p in zip(pictures, prompts)]
    assert scores.tolist() == pytest.approx(expected, abs=1e-5)
    assert max(expected) - min(expected) > 1e-3


def test_clip_image_is_the_mean_cosine_to_the_references(clip_file, reference_clip, pictures):
    image, _ = reference_clip
    scores = clip_image(load_clip(*clip_file), pictures, pictures[:2])
    expected = [sum(max(0.0, float(image(i) @ image(r))) for r in pictures[:2]) / 2 for i in pictures]
    assert scores.tolist() == pytest.approx(expected, abs=1e-5)


def test_every_pair_is_scored_whatever_the_batch(clip_file, pictures):
    clip = load_clip(*clip_file)
    many = [random.Random(0).choice(pictures) for _ in range(70)]
    at_once = image_similarity(clip, many, pictures)
    one_by_one = torch.cat([image_similarity(clip, [picture], pictures) for picture in many])
    assert at_once.shape == (70, 4)
    torch.testing.assert_close(at_once, one_by_one, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("protocol", "score"),
    [("floored mean", 0.4), ("DreamBooth", 0.1), ("TextBoost 2024", 0.1), ("TextBoost 2026", 0.8), ("DVAR", 0.1)],
)
def test_each_protocol_compares_with_the_references_as_its_authors(protocol, score):
    """Cosines of -0.6 and 0.8 to two references: with or without the floor at 0, their mean or the best."""
    features = {"a": [1.0, 0.0], "b": [-0.6, 0.8], "c": [0.8, 0.6]}
    extractor = FeatureExtractor(
        name="made up", image_features=lambda names: torch.tensor([features[n] for n in names])
    )
    config = ScorerConfig(reference_scores=protocol)
    for measure in (clip_image, dino):
        found = measure(extractor, ["a"], ["b", "c"], **REFERENCE_SCORES[config.reference_scores])
        assert found.tolist() == pytest.approx([score])


def test_negative_cosines_count_as_nothing():
    features = {"a": [1.0, 0.0], "b": [-1.0, 0.0], "c": [0.0, 1.0]}
    extractor = FeatureExtractor(
        name="made up", image_features=lambda names: torch.tensor([features[n] for n in names])
    )
    assert clip_image(extractor, ["a"], ["a", "b", "c"]).tolist() == pytest.approx([1 / 3])
    assert image_similarity(extractor, ["a"], ["b"]).tolist() == [[-1.0]]


def test_one_prompt_for_each_image(clip_file, pictures):
    with pytest.raises(ValueError, match="4 images but 1 prompts"):
        clip_text(load_clip(*clip_file), pictures, ["a dog"])


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "test_convnext"])
def test_dino_through_timm(name, pictures, tmp_path):
    timm = pytest.importorskip("timm")
    from safetensors.torch import save_file

    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=0).eval()
    save_file(model.state_dict(), tmp_path / "weights.safetensors")
    encoder = load_image_encoder(name, tmp_path / "weights.safetensors")
    transform = timm.data.create_transform(**timm.data.resolve_data_config(model=model))
    with torch.no_grad():
        vectors = [unit(model(transform(picture.convert("RGB"))[None])[0]) for picture in pictures]
    expected = [max(0.0, float(v @ vectors[0])) for v in vectors]
    assert dino(encoder, pictures, pictures[:1]).tolist() == pytest.approx(expected, abs=1e-5)


def test_dino_through_transformers(pictures, tmp_path):
    from transformers import BitImageProcessor, Dinov2Config, Dinov2Model

    torch.manual_seed(0)
    config = Dinov2Config(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=14)
    model = Dinov2Model(config).eval()
    processor = BitImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 28, "width": 28})
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    inputs = processor(images=[picture.convert("RGB") for picture in pictures], return_tensors="pt")
    with torch.no_grad():
        tokens = model(**inputs).last_hidden_state[:, 0]
    expected = F.cosine_similarity(tokens.double(), tokens[:1].double()).clamp(min=0)
    scores = dino(load_image_encoder(str(tmp_path)), pictures, pictures[:1])
    assert scores.tolist() == pytest.approx(expected.tolist(), abs=1e-5)


def test_a_weight_file_needs_a_timm_name(tmp_path):
    pytest.importorskip("timm")
    with pytest.raises(ValueError, match="is not a model of timm"):
        load_image_encoder("facebook/unknown", tmp_path / "weights.safetensors")


@pytest.mark.parametrize(
    ("prompt", "plain"),
    [
        ("a photo of a <dog> on grass", "a photo of a dog on grass"),
        ("a photo of a <dog> dog on grass", "a photo of a dog on grass"),
        ("a dog", "a dog"),
        ("a photo of <dog> dog and <dog>", "a photo of dog and dog"),
    ],
)
def test_plain_prompt_has_the_class_word_once(prompt, plain):
    assert plain_prompt(prompt, "<dog>", "dog") == plain


def test_plain_prompt_changes_whole_words_alone():
    assert plain_prompt("a 007 of 2007", "007", "spy") == "a spy of 2007"


def test_plain_prompt_can_drop_the_placeholder():
    assert plain_prompt("a photo of <dog> dog", "<dog>", "") == "a photo of dog"


@pytest.fixture(scope="module")
def metric_models():
    """The demo's own evaluators, as shipped."""
    pytest.importorskip("timm")
    from personalize.demo import evaluators

    return evaluators.load()


@pytest.fixture(scope="module")
def two_individuals():
    """Four images each of two dogs that no training saw, in the same scenes."""
    from personalize.demo import world

    scenes = [world.Scene("in the snow"), world.Scene("on grass"), world.Scene("at night"), world.Scene("on water")]
    dogs = [world.instance(world.TEST_SEEDS[seed], "dog") for seed in (100, 101)]
    return [[world.picture(world.draw(dog, s, random.Random(f"{s}"))) for s in scenes] for dog in dogs]


def test_the_metric_models_tell_two_dogs_apart(metric_models, two_individuals):
    one, other = two_individuals
    for score in (metric_models.identity, metric_models.identity_named, metric_models.identity_unnamed):
        assert score(one[1:], one[:1]).mean() > score(other[1:], one[:1]).mean() + 0.1


def test_the_metric_models_read_prompts_and_attributes(metric_models, two_individuals):
    from personalize.demo import world

    pictures = two_individuals[0]
    right = metric_models.clip_text(pictures[:1], ["a photo of a dog in the snow"])
    wrong = metric_models.clip_text(pictures[:1] * 2, ["a photo of a car in the snow", "a photo of a dog on water"])
    assert (right > wrong).all()
    thing = world.instance(world.TEST_SEEDS[100], "dog")
    read = metric_models.attributes(pictures)
    assert sum(found["subject"] == "dog" for found in read) >= 3
    assert sum(found["colour"] == thing.colour for found in read) >= 3


def test_stored_clip_expands_to_the_same_file_every_time(tmp_path):
    from safetensors.torch import load_file

    from personalize.demo import evaluators

    packed = evaluators.WEIGHTS / "evaluator_clip.safetensors"
    first, second = (load_file(evaluators.expand_clip(packed, tmp_path / f"{i}.safetensors")) for i in (1, 2))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert first[evaluators.ROWS].shape == (49408, 128)


def test_gap_closed_is_a_ratio_of_means_with_a_jackknife_error():
    from personalize.benchmarks import fidelity_report

    each = {"untuned": [0.1, 0.3, 0.2], "real": [0.9, 0.7, 0.8], "method": [0.5, 0.4, 0.6]}
    rows = {name: {"identity": {"each": dict(enumerate(values))}} for name, values in each.items()}
    closed = fidelity_report.closed(rows, "method", "identity")
    assert closed["mean"] == pytest.approx((0.5 - 0.2) / (0.8 - 0.2))
    left_out = [(0.5 - 0.25) / (0.75 - 0.25), (0.55 - 0.15) / (0.85 - 0.15), (0.45 - 0.2) / (0.8 - 0.2)]
    middle = sum(left_out) / 3
    error = (2 / 3 * sum((value - middle) ** 2 for value in left_out)) ** 0.5
    assert closed["standard_error"] == pytest.approx(error)
    assert fidelity_report.closed(rows, "untuned", "identity")["mean"] == 0
    assert fidelity_report.closed({"method": rows["method"]}, "method", "identity") is None


def test_all_that_is_missing_is_named_at_once(tmp_path):
    config = ScorerConfig(clip_weights="a.safetensors", dino_weights="b.safetensors")
    with pytest.raises(ValueError) as refused:
        config.check(ExtractorCache(folders=lambda: [tmp_path]))
    where = "below models/clip_vision or models/personalize: put them there, or correct the name"
    assert str(refused.value) == (
        f"There are no CLIP weights 'a.safetensors' {where}; there are no DINO weights 'b.safetensors' {where}."
    )
