"""Each workflow on a real server with the tiny model: does it train, draw, and use a finished training again?"""

import csv
import io
import json
from pathlib import Path

import pytest
from PIL import Image

from personalize.demo import client as api
from personalize.demo import show
from personalize.demo.workflow import override, to_api
from personalize.tests.support import evaluating, host
from personalize.trainers.runs.folder import RunFolder
from personalize.trainers.runs.pick import preferred

ROOT = Path(__file__).resolve().parents[2]
pytestmark = [pytest.mark.slow, pytest.mark.comfy]


@pytest.fixture(scope="module")
def textboost(object_info):
    """The API prompt of workflows/before_and_after.json with the demo's values, cut to a few steps."""
    prompt = to_api(show.read_json(ROOT / "workflows" / "before_and_after.json"), object_info)
    return override(override(prompt, host.demo_overrides()), host.QUICK)


def one_picture(server, prompt, title):
    return server.images(server.run(prompt))[show.node_titled(prompt, title)][0].tobytes()


def pictures(server, prompt):
    images = server.images(server.run(prompt))
    return [images[show.node_titled(prompt, title)][0].tobytes() for title in (show.UNTRAINED, show.TRAINED)]


def shared():
    """The demo's values for the templates of other methods, and of the first one, which have one prompt."""
    others = ("PersonalizeTextBoost", "Untrained: prompt", "Trained: prompt")
    return {kind: inputs for kind, inputs in host.demo_overrides().items() if kind not in others}


def without_training(prompt):
    """The prompt with the checkpoint's model and text encoder in place of the trained ones."""
    (loader,) = (number for number, node in prompt.items() if node["class_type"] == "CheckpointLoaderSimple")
    trained = [number for number, node in prompt.items() if node["class_type"] == "PersonalizeTrain"]
    kept = {
        k: node for k, node in prompt.items() if node["class_type"] not in ("PersonalizeSave", "PersonalizePlotHistory")
    }
    links = {(number, slot): [loader, slot] for number in trained for slot in (0, 1)}

    def source(value):
        return links.get(tuple(value), value) if isinstance(value, list) else value

    return {k: {**node, "inputs": {name: source(v) for name, v in node["inputs"].items()}} for k, node in kept.items()}


def new_images(server, prompt):
    """The image of a template without and with the training."""
    return [one_picture(server, each, "New images") for each in (without_training(prompt), prompt)]


def logs(server):
    """{log of a training: when it was last written}"""
    return {log: log.stat().st_mtime_ns for log in (server.base / "output").glob("personalize/runs/*/steps.jsonl")}


def test_training_changes_the_trained_image_only_and_happens_once(server, textboost):
    earlier = logs(server)  # other tests train on the same server
    untrained, trained = pictures(server, textboost)
    assert untrained != trained
    before = logs(server)
    (log,) = before.keys() - earlier.keys()
    assert len(log.read_text().splitlines()) == 3

    # The untrained half once more, drawn afresh because another prompt came between: the base model is untouched.
    alone = {number: node for number, node in textboost.items() if number != show.node_titled(textboost, show.TRAINED)}
    server.run(override(alone, {"KSampler": {"cfg": 7.0}}))
    assert one_picture(server, alone, show.UNTRAINED) == untrained

    other = override(textboost, {"Trained: prompt": {"text": "a sketch of a <concept> at night"}})
    assert pictures(server, other)[1] != trained
    # Back again: the host has forgotten, the folder of the run has not.
    server.client.post("/free", {"unload_models": True, "free_memory": True})
    assert pictures(server, textboost) == [untrained, trained]
    assert logs(server) == before


def test_another_seed_is_another_training(server, textboost):
    before = logs(server)
    pictures(server, override(textboost, {"PersonalizeTrain": {"seed": 1}}))
    assert len(logs(server)) == len(before) + 1


@pytest.fixture(scope="module")
def attndreambooth(object_info):
    """The API prompt of workflows/attndreambooth.json with the demo's values, each stage of two steps."""
    prompt = to_api(show.read_json(ROOT / "workflows" / "attndreambooth.json"), object_info)
    small = {f"preset.{name}_{stage}": 2 for name in ("steps", "batch_size") for stage in (1, 2, 3)}
    quick = {**host.QUICK, "PersonalizeAttnDreamBooth": {**small, "preset.views": 8}}
    return override(
        override(prompt, shared()), {kind: v for kind, v in quick.items() if kind != "PersonalizeTextBoost"}
    )


def stages(log):
    return [json.loads(line)["stage"] for line in log.read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize("weights", ["lora", "full"])
def test_three_stages_train_and_draw(server, attndreambooth, weights):
    earlier = logs(server)
    prompt = override(attndreambooth, {"PersonalizeAttnDreamBooth": {"preset.fine_tuning": weights}})
    untrained, trained = new_images(server, prompt)
    assert untrained != trained
    (log,) = logs(server).keys() - earlier.keys()
    assert stages(log) == [f"attndreambooth {stage}" for stage in (1, 1, 2, 2, 3, 3)]
    (encode,) = (n for n in prompt.values() if n["class_type"] == "CLIPTextEncode" and n["inputs"]["text"])
    assert "<concept> dog" in encode["inputs"]["text"]  # as this method trains it


def test_stages_chained_through_a_graph(server, attndreambooth):
    """One Train behind the other: the word of the first, the attention of the second, in one image."""
    prompt = override(attndreambooth, {"PersonalizeAttnDreamBooth": {"preset.run_stages": "1"}})
    (recipe,) = (k for k, n in prompt.items() if n["class_type"] == "PersonalizeAttnDreamBooth")
    (first,) = (k for k, n in prompt.items() if n["class_type"] == "PersonalizeTrain")
    later = prompt[recipe]["inputs"] | {"preset.run_stages": "2+3"}
    prompt["later"] = {"class_type": "PersonalizeAttnDreamBooth", "inputs": later}
    inputs = prompt[first]["inputs"] | {"model": [first, 0], "clip": [first, 1], "recipe": ["later", 0]}
    for node in prompt.values():
        for name, link in node["inputs"].items():
            if link in ([first, 0], [first, 1]):
                node["inputs"][name] = ["second", link[1]]
    prompt["second"] = {"class_type": "PersonalizeTrain", "inputs": inputs}
    earlier = logs(server)
    untrained, trained = new_images(server, prompt)
    assert untrained != trained
    runs = sorted(stages(log) for log in logs(server).keys() - earlier.keys())
    assert runs == [["attndreambooth 1"] * 2, [f"attndreambooth {stage}" for stage in (2, 2, 3, 3)]]


def test_a_later_stage_alone_says_that_it_needs_the_word(server, attndreambooth):
    prompt = override(attndreambooth, {"PersonalizeAttnDreamBooth": {"preset.run_stages": "3"}})
    with pytest.raises(api.HostError, match="Stage 3 continues from a learned placeholder token, .* know <concept>"):
        server.run(prompt)


@pytest.fixture(scope="module")
def dvar(object_info):
    """The API prompt of workflows/dvar.json with the demo's values and a window of three steps."""
    prompt = to_api(show.read_json(ROOT / "workflows" / "dvar.json"), object_info)
    quick = {kind: inputs for kind, inputs in host.QUICK.items() if kind != "PersonalizeTextBoost"}
    quick["PersonalizeDreamBoothLoRA"] = {"preset.steps": 12, "preset.views": 8}
    quick["PersonalizeDVAR"] = {"preset.window": 3, "preset.every": 1, "preset.threshold": 1.0, "preset.min_steps": 4}
    return override(override(prompt, shared()), quick)


def test_a_monitor_ends_the_training_and_the_graph_goes_on(server, dvar):
    earlier = logs(server)
    untrained, trained = new_images(server, dvar)
    assert untrained != trained
    (log,) = logs(server).keys() - earlier.keys()
    entries = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    assert 4 <= len(entries) < 12 and entries[-1]["measures"]["DVAR"]["ratio"] < 1
    about = json.loads((log.parent / "run.json").read_text(encoding="utf-8"))
    assert about["stops"][0]["monitor"] == "DVAR" and about["stops"][0]["step"] == len(entries)
    history = server.client.get(f"/personalize/runs/{log.parent.name}")
    assert history["stops"] == about["stops"] and len(history["entries"]) == len(entries)


def test_a_preference_picks_a_state_without_another_training(server, object_info):
    prompt = to_api(show.read_json(ROOT / "workflows" / "pick_by_score.json"), object_info)
    quick = {kind: inputs for kind, inputs in host.QUICK.items() if kind != "PersonalizeTextBoost"}
    metric_models = evaluating.write_for_server(server.base / "models" / "clip_vision")
    quick["PersonalizeMetricModels"] = metric_models
    quick["PersonalizeDreamBoothLoRA"] = {"preset.steps": 6, "preset.views": 8, "preset.learning_rate": 0.002}
    quick["PersonalizePickByScore"] = {"every": 2, "sampler_steps": 2, "seeds": 1, "prompts": "a {} on grass"}
    prompt = override(override(prompt, shared()), quick)
    earlier = logs(server)
    drawn = {}
    for weight in (0.0, 0.5, 1.0):
        asked = override(prompt, {"PersonalizePickByScore": {"text_weight": weight}})
        untrained, trained = new_images(server, asked)
        ((log, _),) = logs(server).items() - earlier.items()
        step = preferred(RunFolder(log.parent).history(6), weight).step
        assert trained != untrained and drawn.setdefault(step, trained) == trained
    assert len(logs(server).keys() - earlier.keys()) == 1 and len({*drawn.values()}) == len(drawn)


METHODS = ["TextBoost", "AttnDreamBooth", "Textual Inversion", "DreamBooth-LoRA", "Custom Diffusion"]
SHORT = {"preset.steps": 3, "preset.batch_size": 2, "preset.views": 4}


@pytest.fixture(scope="module")
def compared(server, object_info):
    """The API prompt of workflows/compare_methods.json with the demo's image, each method cut to a few steps."""
    prompt = to_api(show.read_json(ROOT / "workflows" / "compare_methods.json"), object_info)
    metric_models = evaluating.write_for_server(server.base / "models" / "clip_vision")
    stages = {f"preset.{name}_{stage}": 2 for name in ("steps", "batch_size") for stage in (1, 2, 3)}
    return override(prompt, {
        **{kind: host.demo_overrides()[kind] for kind in ("CheckpointLoaderSimple", "LoadImage")},
        "PersonalizeLoadReferences": {"resolution": 128, "class_word": "dog"},
        **{f"Personalize{name}": SHORT for name in ("TextualInversion", "DreamBoothLoRA")},
        "PersonalizeTextBoost": SHORT | host.CAPTIONS,
        "PersonalizeCustomDiffusion": SHORT | {"preset.class_images": 2, "preset.class_image_steps": 2},
        "PersonalizeAttnDreamBooth": {**stages, "preset.views": 4},
        "PersonalizeMetricModels": metric_models,
        "PersonalizeCompareMethods": {"prompts": "a photo of a {} on the beach\na sketch of a {}", "steps": 2},
    })  # fmt: skip


def comparison(server, prompt):
    """What the node shows, table, scatter and grid, and the folder of its files."""
    history, (node,) = server.run(prompt), [k for k, n in prompt.items() if n["class_type"].endswith("CompareMethods")]
    told = "\n".join(history["outputs"][node]["text"])
    return server.images(history)[node], server.base / "output" / Path(told.split("\n")[0]).parent


def reports(folder):
    return show.read_json(folder / "report.json")["reports"]


def test_five_methods_in_one_node(server, compared):
    earlier = logs(server)
    shown, folder = comparison(server, compared)
    trained = logs(server)
    assert len(trained.keys() - earlier.keys()) == 5
    files = {"report.csv", "report.json", "report.html", "table.png", "grid.png", "scatter.png"}
    assert {each.name for each in folder.iterdir()} == files and folder.parent.name == "reports"
    told = reports(folder)
    assert [each["label"] for each in told] == ["untrained", *METHODS] and told[0]["role"] == "floor"
    subjects = ["dog", "<concept>", "<concept> dog", "<concept>", "<concept>", "<concept> dog"]
    assert [each["prompts"][1]["prompt"] for each in told] == [f"a sketch of a {subject}" for subject in subjects]
    assert all(each["scores"][name]["n"] == 4 for each in told for name in ("CLIP-T", "DINO seen"))
    means = [row for row in csv.DictReader(io.StringIO((folder / "report.csv").read_text())) if row["of"] == "mean"]
    assert [row["report"] for row in means] == ["untrained (floor)", *METHODS]
    # Six rows, one of which learned nothing; two prompts of two seeds, 128 pixels each.
    grid = shown[2]
    assert grid.size[1] == 34 + 6 * (128 + 6) and grid.size[0] > 4 * 128
    rows = [grid.crop((grid.size[0] - 134, 34 + 134 * i, grid.size[0] - 20, 34 + 134 * i + 128)) for i in range(6)]
    assert len({row.tobytes() for row in rows}) == 6
    for name, image in zip(("table", "scatter", "grid"), shown, strict=True):
        with Image.open(folder / f"{name}.png") as kept:
            assert kept.convert("RGB").tobytes() == image.convert("RGB").tobytes()

    # Another prompt, without the first method, and the last one twice: nothing is trained again but what is new.
    server.client.post("/free", {"unload_models": True, "free_memory": True})
    other = override(compared, {"PersonalizeCompareMethods": {"prompts": "a photo of a {} at night"}})
    (node,) = (each for each in other.values() if each["class_type"] == "PersonalizeCompareMethods")
    (custom,) = (each for each in other.values() if each["class_type"] == "PersonalizeCustomDiffusion")
    other["again"] = {**custom, "inputs": custom["inputs"] | {"preset.class_image_steps": 3}}
    node["inputs"]["recipes.recipe0"] = ["again", 0]
    assert [each["label"] for each in reports(comparison(server, other)[1])] == [
        "untrained", "Custom Diffusion, own settings 1", *METHODS[1:4], "Custom Diffusion, own settings 2",
    ]  # fmt: skip
    assert len(logs(server).keys() - trained.keys()) == 1 and trained.items() <= logs(server).items()


def test_the_same_comparison_again_does_nothing(server, compared):
    few = override(compared, {"PersonalizeCompareMethods": {"prompts": "a photo of a {}", "seeds": 1}})
    (node,) = (number for number, each in few.items() if each["class_type"] == "PersonalizeCompareMethods")
    for number in range(1, len(METHODS)):
        del few[node]["inputs"][f"recipes.recipe{number}"]
    shown, folder = comparison(server, few)
    before = {file: file.stat().st_mtime_ns for file in folder.iterdir()}
    history = server.run(few)
    assert node in dict(history["status"]["messages"])["execution_cached"]["nodes"]
    assert {file: file.stat().st_mtime_ns for file in folder.iterdir()} == before


def test_what_a_comparison_cannot_do_is_said_before_the_first_training(server, compared):
    before = logs(server)
    stage = {"PersonalizeAttnDreamBooth": {"preset.run_stages": "3"}, "PersonalizeCompareMethods": {"seed": 3}}
    with pytest.raises(api.HostError, match="AttnDreamBooth: Stage 3 continues from a learned placeholder token"):
        server.run(override(compared, stage))
    missing = {"PersonalizeMetricModels": {"dino_weights": "none.safetensors"}}
    with pytest.raises(api.HostError, match="There are no DINO weights 'none.safetensors'"):
        server.run(override(compared, stage | missing | {"PersonalizeAttnDreamBooth": {}}))
    assert logs(server) == before


def test_every_workflow_has_its_image():
    for path in (ROOT / "workflows").glob("*.json"):
        assert path.with_suffix(".jpg").exists()


def test_the_first_graph_learns_draws_and_saves(server, object_info):
    """One training, four images, files for the stock loaders; another prompt draws, but trains and saves nothing."""
    before = logs(server)
    folders = [server.base / "models" / kind for kind in ("loras", "embeddings", "personalize")]
    prompt = to_api(show.read_json(ROOT / "workflows" / "learn_one_picture.json"), object_info)
    prompt = override(override(prompt, shared()), host.QUICK)
    size = {
        "EmptyLatentImage": {"width": 128, "height": 128, "batch_size": 4},
        "Keeps what it learned": {"name": "one"},
    }
    prompt = override(prompt, {**size, "PersonalizeTrain": {"seed": 77}})
    history = server.run(prompt)
    images = server.images(history)[show.node_titled(prompt, "New images")]
    assert len({image.tobytes() for image in images}) == 4 and images[0].size == (128, 128)
    said = history["outputs"][show.node_titled(prompt, "Keeps what it learned")]["text"][0]
    assert (
        said == "Saved one.safetensors in loras and in embeddings and in personalize; write embedding:one in prompts."
    )
    assert len(logs(server)) == len(before) + 1

    server.client.post("/free", {"unload_models": True, "free_memory": True})
    again = override(prompt, {"5  What to generate": {"text": "a painting of a <concept>"}})
    others = server.images(server.run(again))[show.node_titled(prompt, "New images")]
    assert others[0].tobytes() != images[0].tobytes()
    assert len(logs(server)) == len(before) + 1
    assert [sorted(file.name for file in folder.glob("one*")) for folder in folders] == [["one.safetensors"]] * 3
