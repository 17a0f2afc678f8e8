"""A real ComfyUI with this pack: does it load, and does its stock loader read the tiny checkpoint and draw with it?"""

import pytest

from personalize.demo import client

pytestmark = [pytest.mark.slow, pytest.mark.comfy]


def text_to_image(checkpoint, prompt="a photo of a dog", steps=3, seed=1, size=128):
    """The smallest stock workflow as an API prompt."""
    sampler = {"seed": seed, "steps": steps, "cfg": 3.0, "sampler_name": "ddim", "scheduler": "normal", "denoise": 1.0}
    return {
        "1": {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": checkpoint}},
        "2": {"class_type": "CLIPTextEncode", "inputs": {"clip": ["1", 1], "text": prompt}},
        "3": {"class_type": "CLIPTextEncode", "inputs": {"clip": ["1", 1], "text": ""}},
        "4": {"class_type": "EmptyLatentImage", "inputs": {"width": size, "height": size, "batch_size": 2}},
        "5": {
            "class_type": "KSampler",
            "inputs": sampler
            | {"model": ["1", 0], "positive": ["2", 0], "negative": ["3", 0], "latent_image": ["4", 0]},
        },
        "6": {"class_type": "VAEDecode", "inputs": {"samples": ["5", 0], "vae": ["1", 2]}},
        "7": {"class_type": "SaveImage", "inputs": {"images": ["6", 0], "filename_prefix": "test"}},
    }


def test_the_pack_loads_with_its_nodes(server, object_info):
    assert "IMPORT FAILED" not in server.log
    assert {"PersonalizeLoadReferences", "PersonalizeTextBoost", "PersonalizeTrain"} <= set(object_info)


def test_the_stock_loader_reads_the_tiny_checkpoint_and_draws(server):
    pictures = server.images(server.run(text_to_image(server.checkpoint)))["7"]
    assert [picture.size for picture in pictures] == [(128, 128)] * 2
    # Different noise, different image; a broken model draws one flat colour.
    assert pictures[0].tobytes() != pictures[1].tobytes()
    assert all(low < high for low, high in pictures[0].convert("RGB").getextrema())


def test_a_refused_prompt_and_a_failed_node_are_named(server):
    prompt = text_to_image("no-such.safetensors")
    with pytest.raises(client.HostError, match=r"CheckpointLoaderSimple \(node 1\): Value not in list"):
        server.run(prompt)
    prompt = text_to_image(server.checkpoint)
    # The text encoder instead of the autoencoder passes validation by type only, so the image comes from nowhere.
    prompt["6"] = {"class_type": "LoadImage", "inputs": {"image": "missing.png"}}
    with pytest.raises(client.HostError, match="LoadImage"):
        server.run(prompt)
