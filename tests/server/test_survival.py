"""A run across processes, in a real ComfyUI: killed and resumed, loaded into a new server, listed and deleted.

One server after the other on the same base directory, as a user's machine has it.
"""

import io
import json
import random
import sys
import time

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file

from personalize.demo import client as api
from personalize.tests.support import host, waiting

pytestmark = [pytest.mark.slow, pytest.mark.comfy]

STEPS = 30


def prompt(checkpoint, **train):
    """Load, train, draw: the API form of a small workflow; every widget that is left out has its default."""
    references = {"images.image0": ["image", 0], "folder": "", "class_word": "dog", "placeholder_token": "<concept>"}
    references |= {"initializer_token": "", "resolution": 128, "crop": "center", "max_images": 0, "select_images": ""}
    recipe = {"preset": "benchmark", "preset.steps": STEPS, "preset.batch_size": 4, "preset.views": 8, **host.CAPTIONS}
    graph = {
        "checkpoint": ("CheckpointLoaderSimple", {"ckpt_name": checkpoint}),
        "image": ("LoadImage", {"image": "dog.png"}),
        "references": ("PersonalizeLoadReferences", references),
        "recipe": ("PersonalizeTextBoost", recipe),
        "train": (
            "PersonalizeTrain",
            {"model": ["checkpoint", 0], "clip": ["checkpoint", 1], "vae": ["checkpoint", 2]}
            | {"concept": ["references", 0], "recipe": ["recipe", 0], "seed": 0, "preview_prompts": "a {}"}
            | {"preview_every": 0, "previews_per_prompt": 1, "preview_steps": 2, "preview_cfg": 4.0}
            | {"precision": "auto", "micro_batch_size": 0, "checkpoint_every": 5}
            | train,
        ),
    }
    return graph | drawn_with("train")


def drawn_with(node):
    """An image with the MODEL and CLIP of a node."""
    return {
        "positive": ("CLIPTextEncode", {"clip": [node, 1], "text": "a photo of <concept> in the snow"}),
        "negative": ("CLIPTextEncode", {"clip": [node, 1], "text": ""}),
        "latent": ("EmptyLatentImage", {"width": 128, "height": 128, "batch_size": 1}),
        "sampler": (
            "KSampler",
            {"model": [node, 0], "positive": ["positive", 0], "negative": ["negative", 0], "seed": 1, "steps": 4}
            | {
                "latent_image": ["latent", 0],
                "cfg": 3.0,
                "denoise": 1.0,
                "sampler_name": "ddim",
                "scheduler": "normal",
            },
        ),
        "decode": ("VAEDecode", {"samples": ["sampler", 0], "vae": ["checkpoint", 2]}),
        "out": ("SaveImage", {"images": ["decode", 0], "filename_prefix": "survival"}),
    }


def api_form(graph):
    return {name: {"class_type": kind, "inputs": inputs} for name, (kind, inputs) in graph.items()}


class Machine:
    """A base directory and the servers that run on it one after the other."""

    def __init__(self, comfyui, base):
        from personalize.demo import world

        self.comfyui, self.base, self.server = comfyui, base, None
        host.prepare(base)
        dog = world.instance(world.TEST_SEEDS[0], "dog")
        picture = world.picture(world.draw(dog, world.reference_scene(), random.Random(0)))
        picture.save(base / "input" / "dog.png")

    def restart(self, kill=False):
        if self.server and kill:
            self.server.process.kill()
        if self.server:
            self.server.stop()
        self.server = api.Server(self.comfyui, sys.executable, self.base, cpu=True)
        self.client = self.server.start()

    def run(self, graph):
        return self.client.run(api_form(graph), 300)

    def picture(self, graph):
        """The pixels; the file also holds the prompt."""
        file = self.client.images(self.run(graph))["out"][0]
        return np.asarray(Image.open(io.BytesIO(file))).tolist()

    def folders(self):
        return sorted((self.base / "output" / "personalize" / "runs").glob("*"))


@pytest.fixture(scope="module")
def machine(comfyui, tmp_path_factory):
    machine = Machine(comfyui, tmp_path_factory.mktemp("machine"))
    machine.restart()
    yield machine
    machine.server.stop()


def learned(folder, names=("lora", "clip")):
    files = [load_file(folder / f"{name}.safetensors") for name in names]
    return {key: value.numpy().tobytes() for file in files for key, value in file.items()}


def steps(folder):
    log = folder / "steps.jsonl"
    return [json.loads(line)["step"] for line in log.read_text().splitlines()] if log.exists() else []


def newest_checkpoint(folder):
    """The step of a run's newest checkpoint; a kill may have left another half-written, under a name of its own."""
    return max(int(file.stem[5:]) for file in (folder / "checkpoints").glob("step_*.safetensors"))


def transformer(folder):
    """The same on the host's own modules, with a file instead of an image."""
    from personalize.tests.support import random_native

    name = "random Z-Image.safetensors"
    random_native.write_checkpoint(folder / "models" / "checkpoints" / name)
    small = {"preset": "short", "preset.steps": STEPS, "preset.views": 4, "preset.lora_rank": 2}
    graph = {key: node for key, node in prompt(name).items() if key in ("checkpoint", "image", "references", "train")}
    graph |= {"recipe": ("PersonalizeLoRA", small)}
    return graph | {"save": ("PersonalizeSave", {"result": ["train", 2], "name": "native", "overwrite": True})}


def killed_on_the_way(machine, graph, folder, after):
    """Deleted, trained again, killed after so many steps; returns the step that a new process goes on from."""
    listed = machine.run({"runs": ("PersonalizeRuns", {"action": "delete", "run": folder.name})})
    assert "Deleted" in json.dumps(listed["outputs"]) and not folder.exists()
    machine.client.post("/free", {"free_memory": True})  # the host's own cache would not train again
    machine.client.queue(api_form(graph))
    waiting.until(lambda: len(steps(folder)) >= after, machine.client.alive)
    machine.restart(kill=True)
    assert not json.loads((folder / "run.json").read_text())["complete"]
    newest = newest_checkpoint(folder)
    assert newest >= after - 7  # that of the last multiple of 5 may still be on its way
    return newest


def test_runs_outlive_their_processes(machine):
    """The whole life of two runs; each part needs what the one before it left."""
    graph = prompt(host.CHECKPOINT)
    first = machine.picture(graph)
    (folder,) = machine.folders()
    whole = learned(folder)
    about = json.loads((folder / "run.json").read_text())
    assert about["complete"] and about["steps"] == STEPS

    # Loaded by name, without its images and its recipe.
    load = {"model": ["checkpoint", 0], "clip": ["checkpoint", 1], "run": folder.name}
    loaded = {"checkpoint": graph["checkpoint"], "load": ("PersonalizeLoad", load)} | drawn_with("load")
    assert machine.picture(loaded) == first
    full_precision = loaded | {"load": ("PersonalizeLoad", load | {"full_precision": True})}
    assert machine.picture(full_precision) == machine.picture(full_precision)

    # Killed, and gone on with in a new process: the same bits.
    killed_on_the_way(machine, graph, folder, 17)
    assert machine.picture(graph) == first
    assert learned(folder) == whole and steps(folder) == list(range(1, STEPS + 1))

    # So is a transformer.
    native = transformer(machine.base)
    machine.run(native)
    (other,) = set(machine.folders()) - {folder}
    whole = learned(other, ["lora"])
    newest = killed_on_the_way(machine, native, other, 12)
    timed = (other / "steps.jsonl").read_text().splitlines()[:newest]
    machine.run(native)
    assert learned(other, ["lora"]) == whole and steps(other) == list(range(1, STEPS + 1))
    assert (other / "steps.jsonl").read_text().splitlines()[:newest] == timed  # with their seconds: not done again

    # This process never trained the first one: it finds it again, in a moment.
    machine.run({k: v for k, v in graph.items() if k in ("checkpoint", "image")} | {"out": see("image")})
    written, began = (folder / "run.json").stat().st_mtime_ns, time.perf_counter()
    assert machine.picture(graph) == first
    print(f"reused and drawn in {time.perf_counter() - began:.2f} s in a new process")
    assert (folder / "run.json").stat().st_mtime_ns == written


def see(node):
    return ("PreviewImage", {"images": [node, 0]})


def test_strengths(machine):
    """Apply at 1 is what Train returns; at 0 the text encoder is the base model's, with the placeholder token."""
    graph = prompt(host.CHECKPOINT)
    trained = machine.picture(graph)

    def applied(**strengths):
        inputs = {"model": ["checkpoint", 0], "clip": ["checkpoint", 1], "result": ["train", 2]}
        inputs |= {"strength_unet": 1.0, "strength_text_encoder": 1.0} | strengths
        return machine.picture(graph | {"apply": ("PersonalizeApply", inputs)} | drawn_with("apply"))

    assert applied() == trained
    assert applied(strength_text_encoder=0.0) != trained


def test_cancelled_and_queued_again(machine):
    """Cancel, and the partial run can be loaded; queue it again, and it goes on where it stopped."""
    graph = prompt(host.CHECKPOINT, seed=1)
    before = set(machine.folders())
    prompt_id = machine.client.queue(api_form(graph))
    waiting.until(
        lambda: any(len(steps(folder)) > 7 for folder in set(machine.folders()) - before), machine.client.alive
    )
    machine.client.interrupt()
    with pytest.raises(api.HostError, match="(?i)interrupt"):
        machine.client.wait(prompt_id, waiting.LIMIT)
    (folder,) = set(machine.folders()) - before
    done = len(steps(folder))
    assert 7 < done < STEPS
    load = {"model": ["checkpoint", 0], "clip": ["checkpoint", 1], "run": folder.name}
    partial = {"checkpoint": graph["checkpoint"], "load": ("PersonalizeLoad", load)} | drawn_with("load")
    early = machine.picture(partial)
    assert f"broken off after step {done}" in json.loads((folder / "run.json").read_text())["stop_reason"]
    machine.run(graph)
    assert steps(folder) == list(range(1, STEPS + 1))
    assert machine.picture(partial) != early
