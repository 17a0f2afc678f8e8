"""Transformers on the host's own modules on a real server: from the loader to an image, and the stock LoRA loader."""

import numpy as np
import pytest

from personalize.tests.support import prompts

pytestmark = [pytest.mark.slow, pytest.mark.comfy]
SMALL = {"preset": "short", "preset.steps": 2, "preset.views": 2, "preset.lora_rank": 2, "preset.learning_rate": 0.01}
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
    trained, untrained = (np.asarray(drawn[name][0]).astype(float) for name in ("trained", "untrained"))
    assert trained.shape == (64, 64, 3) and trained.std() > 1 and (trained != untrained).any()
    before = len(server.log)
    again = np.asarray(server.images(server.run(stock(prompt)))["stock"][0]).astype(float)
    assert np.abs(again - trained).max() <= 1
    assert "not loaded" not in server.log[before:] and "NOT LOADED" not in server.log[before:]


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
