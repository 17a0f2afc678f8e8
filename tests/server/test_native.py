"""Transformers on the host's own modules on a real server: from the loader to an image, and the stock LoRA loader."""

import json

import numpy as np
import pytest

from personalize.demo.client import HostError
from personalize.tests.support import prompts, waiting

pytestmark = [pytest.mark.slow, pytest.mark.comfy]
FAMILIES = ("Lumina Image 2", "Qwen-Image", "Krea 2", "Flux.1", "Flux.2", "SD 3", "Chroma")  # beside Z-Image
SMALL = {"preset": "short", "preset.steps": 2, "preset.views": 2, "preset.lora_rank": 2, "preset.learning_rate": 0.01}
LONG = SMALL | {"preset.steps": 40}
T_LORA = {"steps": 2, "views": 2, "lora_rank": 8, "min_rank": 1, "learning_rate": 0.1}


@pytest.fixture(scope="module")
def checkpoint(server):
    """File name of a random Z-Image in the server's folder."""
    from personalize.tests.support import random_native

    name = "random Z-Image.safetensors"
    random_native.write_checkpoint(server.base / "models" / "checkpoints" / name)
    return name


def graph(object_info, checkpoint, node="LoRA", recipe=SMALL):
    """The smallest training with this node for its recipe, and an image of its model."""
    prompt = prompts.smallest(object_info, checkpoint)
    prompt["recipe"] = {"class_type": f"Personalize{node}", "inputs": recipe}
    prompt["references"]["inputs"] |= {"class_word": "dog", "placeholder_token": "sks"}
    prompt["train"]["inputs"] |= {"preview_every": 1, "preview_steps": 1, "preview_cfg": 1.0}
    prompt["save"]["inputs"]["name"] = "native"
    return prompt | image("trained", ["train", 0], ["train", 1])


def stock(prompt):
    """An image with the saved LoRA in LoraLoaderModelOnly."""
    options = {"model": ["checkpoint", 0], "lora_name": "native.safetensors", "strength_model": 1.0}
    lora = {"lora": {"class_type": "LoraLoaderModelOnly", "inputs": options}}
    return lora | {"checkpoint": prompt["checkpoint"]} | image("stock", ["lora", 0], ["checkpoint", 1])


def image(name, model, clip):
    """Nodes that draw an image with a model, saved under the node's name."""
    options = {"seed": 1, "steps": 2, "cfg": 1.0, "sampler_name": "euler", "scheduler": "simple", "denoise": 1.0}
    links = {"positive": [f"{name} text", 0], "negative": [f"{name} text", 0], "latent_image": [f"{name} size", 0]}
    size = {"width": 64, "height": 64, "batch_size": 1}
    return {
        f"{name} text": {"class_type": "CLIPTextEncode", "inputs": {"clip": clip, "text": "a photo of sks dog"}},
        f"{name} size": {"class_type": "EmptySD3LatentImage", "inputs": size},
        f"{name} latent": {"class_type": "KSampler", "inputs": {"model": model, **links, **options}},
        f"{name} decoded": {
            "class_type": "VAEDecode", "inputs": {"samples": [f"{name} latent", 0], "vae": ["checkpoint", 2]},
        },
        name: {"class_type": "SaveImage", "inputs": {"images": [f"{name} decoded", 0], "filename_prefix": name}},
    }  # fmt: skip


def test_from_the_loader_to_an_image_and_to_the_stock_lora_loader(server, object_info, checkpoint):
    """The saved LoRA in LoraLoaderModelOnly gives the image of Train's MODEL; no key of it is left over."""
    prompt = graph(object_info, checkpoint) | image("untrained", ["checkpoint", 0], ["checkpoint", 1])
    drawn = server.images(server.run(prompt))
    assert_stock_equals(server, stock(prompt), drawn)


def assert_stock_equals(server, prompt, drawn):
    """The saved LoRA gives the image of Train's MODEL, another than without it, and no key of it is left over."""
    trained, untrained = (np.asarray(drawn[name][0]).astype(float) for name in ("trained", "untrained"))
    assert trained.shape == (64, 64, 3) and trained.std() > 1 and (trained != untrained).any()
    before = len(server.log)
    again = np.asarray(server.images(server.run(prompt))["stock"][0]).astype(float)
    assert np.abs(again - trained).max() <= 1
    assert "not loaded" not in server.log[before:] and "NOT LOADED" not in server.log[before:]


def of_three_files(server, family):
    """The loaders of a random transformer and autoencoder in the family's own layouts, and text in its widths."""
    from personalize.tests.support import random_native

    models, name = server.base / "models", f"random {family}.safetensors"
    for folder in ("diffusion_models", "vae", "vae_approx"):
        (models / folder).mkdir(parents=True, exist_ok=True)
    random_native.write_transformer(models / "diffusion_models" / name, family)
    loaders = {
        "unet": ("UNETLoader", {"unet_name": name, "weight_dtype": "default"}),
        "vae": ("VAELoader", {"vae_name": random_native.write_vae(models, family)}),
        "text": ("TestsRandomText", {"clip": ["checkpoint", 1], "family": family}),
    }
    return {name: {"class_type": kind, "inputs": inputs} for name, (kind, inputs) in loaders.items()}


def with_loaders(prompt, loaders, family):
    """The prompt with a MODEL, CLIP and VAE of three files in place of the checkpoint's."""
    links = {("checkpoint", 0): ["unet", 0], ("checkpoint", 1): ["text", 0], ("checkpoint", 2): ["vae", 0]}
    prompt = prompts.relinked(prompt, links)
    for node in prompt.values():
        if family == "Flux.2" and node["class_type"] == "EmptySD3LatentImage":
            node["class_type"] = "EmptyFlux2LatentImage"
    return prompt | loaders


@pytest.mark.parametrize("family", FAMILIES)
def test_each_family_is_broken_off_goes_on_and_serves_the_stock_loader(server, object_info, checkpoint, family):
    """Training, images of Train's MODEL and of the saved LoRA in LoraLoaderModelOnly, which are the same."""
    loaders = of_three_files(server, family)
    prompt = graph(object_info, checkpoint, recipe=LONG) | image("untrained", ["checkpoint", 0], ["checkpoint", 1])
    prompt = with_loaders(prompt, loaders, family)
    prompt["train"]["inputs"] |= {"checkpoint_every": 2, "preview_every": 20}
    runs = server.base / "output" / "personalize" / "runs"
    before = {*runs.glob("*")}

    def lines():
        logs = [run / "steps.jsonl" for run in {*runs.glob("*")} - before]
        return [line for log in logs if log.exists() for line in log.read_text().splitlines()]

    def trains():
        server.client.alive()
        assert not server.client.get(f"/history/{queued}"), "it ended before"

    queued = server.client.queue(prompt)
    waiting.until(lambda: len(lines()) > 5, trains)
    server.client.interrupt()
    with pytest.raises(HostError, match="(?i)interrupt"):
        server.client.wait(queued, waiting.LIMIT)
    done = lines()
    drawn = server.images(server.run(prompt))
    assert len(done) < 40 and lines()[: len(done)] == done and json.loads(lines()[-1])["step"] == 40
    assert_stock_equals(server, with_loaders(stock(prompt), loaders, family), drawn)


def test_t_lora_from_the_loader_to_an_image(server, object_info, checkpoint):
    """The MODEL has fewer ranks than the file that the stock loader applies."""
    recipe = {"preset": "single image"} | {f"preset.{name}": value for name, value in T_LORA.items()}
    prompt = graph(object_info, checkpoint, "TLoRA", recipe)
    trained = np.asarray(server.images(server.run(prompt))["trained"][0]).astype(float)
    again = np.asarray(server.images(server.run(stock(prompt)))["stock"][0]).astype(float)
    assert trained.shape == (64, 64, 3) and trained.std() > 1 and (again != trained).any()


def test_a_method_that_needs_stable_diffusion_is_one_sentence(server, object_info, checkpoint):
    outcome = prompts.run(server.client, graph(object_info, checkpoint, "TextualInversion", {"preset": "short"}))
    assert outcome.kind == "failed" and not prompts.faults(outcome.message)
    assert (
        "needs a token embedding that trains, which Z-Image models do not have here: use T-LoRA or LoRA."
        in outcome.message
    )
