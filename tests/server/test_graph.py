"""The pack inside a real ComfyUI, through its API: train, use, reuse, cancel, save, one sentence for bad input.

Short trainings of the tiny model: what is asked here is whether the graph works, not how alike the images are.
"""

import json
import random

import numpy as np
import pytest
from PIL import Image

from personalize.demo import client as api
from personalize.tests.support import host, waiting
from personalize.tests.support.prompts import defaults

pytestmark = [pytest.mark.slow, pytest.mark.comfy]

STEPS = 6


@pytest.fixture(scope="module")
def reference(server):
    """An image of an unseen dog in the input folder."""
    from personalize.demo import world

    dog = world.instance(world.TEST_SEEDS[0], "dog")
    picture = world.picture(world.draw(dog, world.reference_scene(), random.Random(0)))
    picture.save(server.base / "input" / "dog.png")
    picture.convert("L").save(server.base / "input" / "gray.png")
    return "dog.png"


@pytest.fixture(scope="module")
def graph(server, object_info, reference):
    """`graph(node={input: value}, ...)`: the smallest personalising workflow as an API prompt, with changes."""
    info = {
        name: object_info[f"Personalize{name}"]["input"] for name in ("LoadReferences", "TextBoost", "Train", "Save")
    }
    benchmark = info["TextBoost"]["required"]["preset"][1]["options"][0]["inputs"]
    base = {
        "checkpoint": ("CheckpointLoaderSimple", {"ckpt_name": server.checkpoint}),
        "image": ("LoadImage", {"image": reference}),
        "references": (
            "PersonalizeLoadReferences",
            defaults(info["LoadReferences"])
            | {"images.image0": ["image", 0], "model": ["checkpoint", 0], "resolution": 128, "crop": "center"},
        ),
        "recipe": (
            "PersonalizeTextBoost",
            {f"preset.{name}": value for name, value in defaults(benchmark).items()}
            | {"preset": "benchmark", "preset.steps": STEPS, "preset.views": 8, **host.CAPTIONS},
        ),
        "train": (
            "PersonalizeTrain",
            defaults(info["Train"])
            | {"model": ["checkpoint", 0], "clip": ["checkpoint", 1], "vae": ["checkpoint", 2]}
            | {"concept": ["references", 0], "recipe": ["recipe", 0], "precision": "auto"}
            | {"preview_every": 3, "preview_steps": 2},
        ),
        "positive": ("CLIPTextEncode", {"clip": ["train", 1], "text": "a photo of a (<concept>:1.1), in the snow"}),
        "negative": ("CLIPTextEncode", {"clip": ["train", 1], "text": ""}),
        "latent": ("EmptyLatentImage", {"width": ["references", 3], "height": ["references", 4], "batch_size": 1}),
        "sampler": (
            "KSampler",
            {"model": ["train", 0], "positive": ["positive", 0], "negative": ["negative", 0]}
            | {"latent_image": ["latent", 0], "seed": 1, "steps": 3, "cfg": 3.0, "denoise": 1.0}
            | {"sampler_name": "ddim", "scheduler": "normal"},
        ),
        "decode": ("VAEDecode", {"samples": ["sampler", 0], "vae": ["checkpoint", 2]}),
        "out": ("SaveImage", {"images": ["decode", 0], "filename_prefix": "graph"}),
    }

    def build(**changes):
        prompt = {name: {"class_type": kind, "inputs": dict(inputs)} for name, (kind, inputs) in base.items()}
        for name, inputs in changes.items():
            prompt[name]["inputs"].update(inputs)
        return prompt

    return build


def folders(server):
    return set((server.base / "output" / "personalize" / "runs").glob("*"))


def test_train_and_draw_in_one_graph(server, graph):
    before = folders(server)
    history = server.run(graph())
    pictures = server.images(history)
    assert pictures["out"][0].size == (128, 128)
    (folder,) = folders(server) - before
    assert "train" not in pictures and history["outputs"]["train"] == {"personalize_run": [folder.name]}
    steps = [json.loads(line) for line in (folder / "steps.jsonl").read_text().splitlines()]
    assert [step["step"] for step in steps] == list(range(1, STEPS + 1))
    assert sorted(f.name for f in (folder / "previews").iterdir()) == [f"step_{n:04d}.png" for n in (0, 3, 6)]
    assert json.loads((folder / "run.json").read_text())["complete"]


def test_same_inputs_are_never_trained_twice(server, graph):
    """Also after the host has forgotten everything, and whatever the previews are."""
    server.run(graph())
    before = folders(server)
    server.client.post("/free", {"free_memory": True, "unload_models": True})
    first = server.images(server.run(graph()))["out"][0]
    server.client.post("/free", {"free_memory": True, "unload_models": True})
    second = server.images(server.run(graph(train={"preview_every": 0, "preview_prompts": "x"})))["out"][0]
    assert folders(server) == before
    assert first.tobytes() == second.tobytes()
    server.run(graph(train={"seed": 1}))
    assert len(folders(server)) == len(before) + 1


def test_the_base_model_stays_as_it_was(server, graph):
    """An untrained branch of the same graph draws the same image before and after a training."""

    def untrained(seed):
        prompt = graph(train={"seed": seed}, positive={"clip": ["checkpoint", 1], "text": "a dog in the snow"})
        prompt["negative"]["inputs"]["clip"] = ["checkpoint", 1]
        prompt["sampler"]["inputs"]["model"] = ["checkpoint", 0]
        return prompt

    alone = untrained(0)
    del alone["train"], alone["recipe"]
    before = server.images(server.run(alone))["out"][0]
    beside = untrained(2)
    beside["save"] = {"class_type": "PreviewImage", "inputs": {"images": ["train", 3]}}
    after = server.images(server.run(beside))["out"][0]
    assert before.tobytes() == after.tobytes()


def said(history):
    """What Save shows on its node."""
    return history["outputs"]["save"]["text"][0]


def test_saved_files_do_in_stock_nodes_what_the_graph_does(server, graph):
    prompt = graph(positive={"text": "a photo of a <concept>"}, recipe={"preset.fixed_outputs": False})
    prompt["save"] = {
        "class_type": "PersonalizeSave",
        "inputs": {"result": ["train", 2], "name": "saved_dog", "overwrite": False},
    }
    in_graph = np.asarray(server.images(server.run(prompt))["out"][0]).astype(float)

    stock = graph(positive={"clip": ["lora", 1], "text": "a photo of a embedding:saved_dog"})
    for name in ("train", "recipe"):
        del stock[name]
    stock["lora"] = {
        "class_type": "LoraLoader",
        "inputs": {"model": ["checkpoint", 0], "clip": ["checkpoint", 1], "lora_name": "saved_dog.safetensors"}
        | {"strength_model": 1.0, "strength_clip": 1.0},
    }
    stock["negative"]["inputs"]["clip"] = ["lora", 1]
    stock["sampler"]["inputs"]["model"] = ["lora", 0]
    from_files = np.asarray(server.images(server.run(stock))["out"][0]).astype(float)
    assert np.abs(in_graph - from_files).mean() < 2.0  # of 255; weights are rounded to float16 at random
    prompt["save"]["inputs"]["name"] = "saved_dog "  # the same file, but not the same prompt for the host's cache
    before = {file: file.stat().st_mtime_ns for file in (server.base / "models").rglob("saved_dog*")}
    assert len(before) == 3 and "Saved saved_dog.safetensors" in said(server.run(prompt))
    assert {file: file.stat().st_mtime_ns for file in (server.base / "models").rglob("saved_dog*")} == before


def test_the_complete_file_draws_the_same_image(server, graph):
    """Saved, listed, and loaded by a graph without the training: pixel by pixel what the training drew."""
    prompt = graph()
    inputs = {"result": ["train", 2], "name": "travelling", "overwrite": True}
    prompt["save"] = {"class_type": "PersonalizeSave", "inputs": inputs}
    drawn = server.images(server.run(prompt))["out"][0]
    listed = server.client.object_info()["PersonalizeLoadFiles"]["input"]["required"]["personalized"][1]["options"]
    assert "travelling.safetensors" in listed
    inputs = {"model": ["checkpoint", 0], "clip": ["checkpoint", 1], "personalized": "travelling.safetensors"}
    loading = graph(positive={"clip": ["load", 1]}, negative={"clip": ["load", 1]}, sampler={"model": ["load", 0]})
    loading["latent"]["inputs"] |= {"width": 128, "height": 128}
    loading["load"] = {"class_type": "PersonalizeLoadFiles", "inputs": inputs}
    loading = {name: node for name, node in loading.items() if name not in ("train", "references", "recipe", "image")}
    assert server.images(server.run(loading))["out"][0].tobytes() == drawn.tobytes()


def test_cancel_stops_within_a_step_and_the_next_prompt_runs(server, graph):
    before = folders(server)
    long = graph(recipe={"preset.steps": 100_000}, train={"preview_every": 0, "seed": 5})
    prompt_id = server.client.queue(long)
    waiting.until(lambda: any(steps(folder) for folder in folders(server) - before), server.client.alive)
    (folder,) = folders(server) - before
    server.client.interrupt()
    at_interrupt = len(steps(folder))
    with pytest.raises(api.HostError, match="(?i)interrupt"):
        server.client.wait(prompt_id, waiting.LIMIT)
    assert len(steps(folder)) <= at_interrupt + 2  # the one under way, and one that may end between the two lines
    assert not json.loads((folder / "run.json").read_text())["complete"]
    assert server.images(server.run(graph()))["out"]


def steps(folder):
    file = folder / "steps.jsonl"
    return file.read_text().splitlines() if file.exists() else []


def test_two_concepts_in_one_graph(server, graph):
    """A second training on the first one's MODEL and CLIP: both words work in one prompt."""
    prompt = graph(positive={"clip": ["second", 1], "text": "<concept> and <other>"})
    prompt["references2"] = {
        "class_type": "PersonalizeLoadReferences",
        "inputs": prompt["references"]["inputs"] | {"placeholder_token": "<other>", "class_word": "cat"},
    }
    inputs = prompt["train"]["inputs"] | {"model": ["train", 0], "clip": ["train", 1], "concept": ["references2", 0]}
    prompt["second"] = {"class_type": "PersonalizeTrain", "inputs": inputs}
    prompt["negative"]["inputs"]["clip"] = ["second", 1]
    prompt["sampler"]["inputs"]["model"] = ["second", 0]
    assert server.images(server.run(prompt))["out"]


def test_references_from_lists_batches_and_folders(server, graph):
    folder = server.base / "input" / "many"
    folder.mkdir(exist_ok=True)
    for i, size in enumerate([(64, 96), (200, 80), (128, 128)]):
        Image.new("RGB", size, (80 * i, 0, 0)).save(folder / f"{i}.png")
    rotated = Image.new("RGB", (40, 20), (0, 0, 255))
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned
    rotated.save(folder / "turned.jpg", exif=exif)
    prompt = graph(references={"folder": "many", "select_images": "1, 3-5"}, recipe={"preset.steps": 1})
    prompt["batch"] = {"class_type": "ImageBatch", "inputs": {"image1": ["image", 0], "image2": ["image", 0]}}
    prompt["references"]["inputs"]["images.image0"] = ["batch", 0]
    before = folders(server)
    server.run(prompt)
    (run,) = folders(server) - before
    sizes = [size_of(file) for file in sorted((run / "images").iterdir())]
    assert sizes == [(128, 128), (64, 96), (200, 80), (128, 128)]
    last = graph(references={"folder": "many", "select_images": "6"}, recipe={"preset.steps": 1})
    last["references"]["inputs"].pop("images.image0")
    with pytest.raises(api.HostError, match="does not exist"):
        server.run(last)
    last["references"]["inputs"]["select_images"] = "4"
    server.run(last)
    (turned,) = folders(server) - before - {run}
    assert size_of(turned / "images" / "00.png") == (20, 40)


def test_a_folder_that_changed_is_trained_anew(server, graph):
    """A new image, an image overwritten by one of the same size, a caption: each once, and not without a change."""
    folder = server.base / "input" / "growing"
    folder.mkdir()
    prompt = graph(references={"folder": "growing"}, recipe={"preset.steps": 1}, train={"preview_every": 0})
    prompt["references"]["inputs"].pop("images.image0")
    changes = [
        lambda: Image.new("RGB", (128, 128), "red").save(folder / "a.png"),
        lambda: Image.new("RGB", (128, 128), "green").save(folder / "b.png"),
        lambda: Image.new("RGB", (128, 128), "blue").save(folder / "a.png"),
        lambda: (folder / "a.txt").write_text("{} on grass"),
        lambda: None,
    ]
    trained = []
    for change in changes:
        change()
        before = folders(server)
        server.run(prompt)
        trained.append(len(folders(server) - before))
    assert trained == [1, 1, 1, 1, 0]


def size_of(file):
    with Image.open(file) as picture:
        return picture.size


@pytest.mark.parametrize(
    ("node", "inputs", "sentence"),
    [
        ("references", {"folder": "../output"}, "not inside ComfyUI's input folder"),
        ("references", {"folder": "/etc"}, "not inside ComfyUI's input folder"),
        ("references", {"folder": "nowhere"}, "does not exist"),
        ("references", {"class_word": " "}, "class word is empty"),
        ("references", {"placeholder_token": "dog"}, "is a word of the vocabulary"),
        ("references", {"placeholder_token": "two words"}, "one word"),
        ("references", {"select_images": "first"}, "cannot be read"),
        ("recipe", {"preset": "nonsense"}, "preset of TextBoost does not exist"),
    ],
)
def test_bad_input_gets_one_sentence(server, graph, node, inputs, sentence):
    with pytest.raises(api.HostError, match=sentence):
        server.run(graph(**{node: inputs}))


def test_no_image_gets_one_sentence(server, graph):
    prompt = graph()
    prompt["references"]["inputs"].pop("images.image0")
    with pytest.raises(api.HostError, match="no reference image"):
        server.run(prompt)


def test_a_cut_out_is_learned_over_white(server, graph):
    """With the mask that Load Image makes of it; the node shows what is left out."""
    cut_out = Image.new("RGBA", (128, 128))
    cut_out.paste((0, 0, 255, 255), (0, 0, 64, 128))
    cut_out.save(server.base / "input" / "cut_out.png")
    prompt = graph(image={"image": "cut_out.png"}, recipe={"preset.steps": 1}, train={"preview_every": 0})
    prompt["references"]["inputs"] |= {"mask": ["image", 1], "invert_mask": True}
    before = folders(server)
    shown = server.images(server.run(prompt))["references"][0]
    (run,) = folders(server) - before
    learned, mask = (np.asarray(Image.open(run / kind / "00.png")) for kind in ("images", "masks"))
    assert (learned[:, 64:] == 255).all() and (learned[:, :64] == (0, 0, 255)).all()
    assert (mask[:, :64] == 255).all() and not mask[:, 64:].any()
    assert shown.getpixel((10, 10)) == (0, 0, 255) and shown.getpixel((100, 10)) == (255, 76, 76)


def test_a_mask_of_another_size_is_refused(server, graph):
    prompt = graph(references={"mask": ["mask", 0]})
    prompt["mask"] = {"class_type": "SolidMask", "inputs": {"value": 1.0, "width": 64, "height": 64}}
    with pytest.raises(api.HostError, match="same size"):
        server.run(prompt)
    prompt["mask"]["inputs"] |= {"width": 128, "height": 128}
    prompt["recipe"]["inputs"]["preset.steps"] = 2
    server.run(prompt)
