"""CLIP Early Stopping as a node: its presets, files of ComfyUI's folders, one sentence for bad input, a training."""

import types
from dataclasses import replace

import pytest

from personalize.tests.support import evaluating, world_clip
from personalize.trainers.metrics.clip import ClipConfig
from personalize.trainers.stopping.clip_early_stopping import PRESETS, ClipEarlyStopping
from personalize.trainers.stopping.monitor import FixedSteps

pytestmark = pytest.mark.comfy
WORLD = {"clip_model": world_clip.CHOICE.clip_model, "clip_weights": f"metric_models/{world_clip.FILE}"}


@pytest.fixture
def clip_vision(tmp_path, monkeypatch, model_folders):
    """ComfyUI's folder of that name, with the world's CLIP in a folder below it; no hub's cache."""
    import folder_paths

    from personalize.nodes.host import session

    place = tmp_path / "models" / "clip_vision"
    (place / "metric_models").mkdir(parents=True)
    world_clip.write(place / "metric_models")
    known = folder_paths.folder_names_and_paths["clip_vision"][1]
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "clip_vision", ([str(place)], known))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    session.extractors.clear()
    return place


def chosen(preset="TextBoost", stopper=(), **values):
    from personalize.nodes.stoppers import CLIPEarlyStoppingStopper

    given = evaluating.connected(values)
    metric_models = given.pop("metric_models")
    return CLIPEarlyStoppingStopper.execute({"preset": preset, **given}, stopper, metric_models).result[0]


def test_each_preset_is_its_settings(clip_vision):
    from personalize.nodes.stoppers import CLIPEarlyStoppingStopper

    options = CLIPEarlyStoppingStopper.define_schema().inputs[0].options
    assert [option.key for option in options] == [*PRESETS]
    for option in options:
        shown = {widget.id: widget.default for widget in option.inputs}
        assert not any(name.startswith("clip_") for name in shown)
        assert all(widget.optional and widget.tooltip.endswith(".") for widget in option.inputs)
        assert chosen(option.key, **shown, **WORLD) == (replace(PRESETS[option.key], **WORLD),)
        assert chosen(option.key, **WORLD) == chosen(option.key, **shown, **WORLD)


def test_it_joins_other_monitors(clip_vision):
    other = FixedSteps(steps=5)
    assert chosen(stopper=(other,), **WORLD) == (other, replace(PRESETS["TextBoost"], **WORLD))


def test_files_of_both_folders(clip_vision, model_folders):
    world_clip.write(model_folders["personalize"])
    assert chosen(clip_model=WORLD["clip_model"], clip_weights=world_clip.FILE)
    assert chosen(clip_model=WORLD["clip_model"], clip_weights=f"metric_models\\{world_clip.FILE}")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"clip_weights": ""}, "is not a model of open_clip|has no weights published"),
        ({"clip_weights": "", "clip_model": "ViT-B-32"}, "are not on this computer, and clip_download is off"),
        ({"clip_weights": "missing.safetensors"}, "There are no CLIP weights"),
        ({"clip_weights": "../clip_vision/metric_models/world.safetensors"}, "is not a name of CLIP weights"),
        ({"clip_weights": "metric_models/old.pt"}, "are not a .safetensors file"),
        ({"clip_model": "ViT-B-33"}, "The CLIP 'ViT-B-33' is not a model"),
        ({"images": 0}, "images is 0: use 1 to 64"),
        ({"stage": "4"}, "choose one of all, 1, 2, 3"),
    ],
)
def test_what_cannot_be_gets_one_sentence(clip_vision, changes, words):
    (clip_vision / "metric_models" / "old.pt").write_bytes(b"no pickle is opened")
    with pytest.raises(ValueError, match=words) as caught:
        chosen(**WORLD | changes)
    assert "\n" not in str(caught.value) and str(clip_vision) not in str(caught.value)


@pytest.fixture
def train(tmp_path, monkeypatch):
    """`train(stopper)`: two steps of a random SD 1.x, through the node's own function; and what it said."""
    import folder_paths

    from personalize.nodes import train
    from personalize.tests.support import random_sd
    from personalize.trainers.data.concept import Concept
    from personalize.trainers.recipes.textboost import TextBoost
    from personalize.trainers.runs.run import Run

    monkeypatch.setattr(folder_paths, "get_output_directory", lambda: str(tmp_path / "output"))
    graph = random_sd.graph(tmp_path)
    concept = Concept(images=world_clip.tensors(world_clip.pictures()), resolution=64)
    recipe = TextBoost(steps=2, batch_size=1, views=2, knowledge_weight=0.0)
    said = []

    def go(*stopper):
        run = Run(concept=concept, recipe=recipe, stopper=stopper)
        hidden = types.SimpleNamespace(unique_id="1", extra_pnginfo=None)
        return train.find_or_train(*graph, run, said.append, hidden=hidden, checkpoint_every=0)

    go.said = said
    return go


def test_a_training_is_watched_and_the_metric_model_leaves(clip_vision, train):
    from personalize.nodes.host import session

    stopper = ClipEarlyStopping(every=1, images=2, sampler_steps=2, patience=0, min_delta=1.0, **WORLD)
    result = train(stopper)
    scores = [entry["measures"]["CLIP Early Stopping"]["score"] for entry in result.history]
    assert len(scores) == 2 and all(-1 <= score <= 1 for score in scores)
    assert [stop["stage_step"] for stop in result.stops] == [2]
    assert f"loading CLIP {world_clip.CHOICE.clip_model} from metric_models/{world_clip.FILE}" in train.said
    assert not session.extractors.loaded
    about = (result.folder / "run.json").read_text()
    # A name goes into files, no path of this computer.
    assert world_clip.FILE in about and str(clip_vision) not in about


def test_a_wrong_file_is_said_before_the_model_is_read(clip_vision, train, monkeypatch):
    from personalize.nodes.host import session, weights

    monkeypatch.setattr(weights, "read_models", lambda *given: pytest.fail("read"))
    wrong = ClipEarlyStopping(**WORLD | {"clip_model": "ViT-B-32"})
    with pytest.raises(ValueError, match="are not those of ViT-B-32"):
        train(wrong)
    assert not session.extractors.loaded


def test_a_recipe_that_asks_a_clip_is_checked_too(clip_vision, monkeypatch):
    """By its property `clip`, whatever method it is."""
    from personalize.nodes import recipes

    class Asking(ClipEarlyStopping):
        clip = ClipConfig(clip_model="ViT-B-33")

    with pytest.raises(ValueError, match="The CLIP 'ViT-B-33' is not a model"):
        recipes.chosen("Any", {"one": Asking()}, {"preset": "one"})
