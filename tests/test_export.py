"""Files that travel: does diffusers read the LoRA and the embedding as what was trained? (The host: test_host.py.)"""

import dataclasses

import pytest
import torch
from safetensors.torch import save_file

from personalize.tests import small
from personalize.trainers import run as runs
from personalize.trainers import training
from personalize.trainers.data import Concept
from personalize.trainers.families import SD1, SD2
from personalize.trainers.recipes.textboost import TextBoost


@pytest.fixture(params=[SD1, SD2], ids=lambda family: family.name)
def trained(tmp_path, request):
    """Models after a short training with large steps and without fixed outputs, and the run's result."""
    models = small.models(family=request.param)
    recipe = TextBoost(
        steps=3, batch_size=2, views=4, lora_learning_rate=2e-2, fixed_outputs=False, augmentation_prompt="words"
    )
    concept = Concept(images=(torch.rand(3, 32, 32),), resolution=32, initializer_token="corgi dog")
    return models, training.train(runs.Run(concept=concept, recipe=recipe), models, tmp_path)


def pipeline(comfyui, family, models=None):
    """A diffusers pipeline with the same base weights that the training started from, or with those of `models`."""
    from diffusers import AutoencoderTiny, DDIMScheduler, StableDiffusionPipeline
    from transformers import CLIPTokenizer

    models = models or small.models(family=family)
    encoder = models.text_encoders[0]
    layers = encoder.text_model.encoder.layers
    del layers[len(encoder.layers_read) :]  # diffusers keeps SD 2.x's encoder without the layer that nobody reads
    padding = "!" if small.PADDING[family.name] == 0 else "<|endoftext|>"
    vocabulary = comfyui / "comfy" / "sd1_tokenizer"
    return StableDiffusionPipeline(
        vae=AutoencoderTiny(),
        text_encoder=encoder.module,
        tokenizer=CLIPTokenizer.from_pretrained(vocabulary, model_max_length=77, pad_token=padding),
        unet=models.unet,
        scheduler=DDIMScheduler(steps_offset=1, clip_sample=False),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


@pytest.mark.comfy
def test_diffusers_loads_lora_and_embedding(trained, comfyui, tmp_path):
    models, result = trained
    save_file({"<concept>": result.tokens["<concept>"][0]}, tmp_path / "embedding.safetensors")
    pipe = pipeline(comfyui, models.family)
    before = pipe.encode_prompt("a photo of a corgi dog", "cpu", 1, False)[0]
    pipe.load_lora_weights(str(tmp_path), weight_name="lora.safetensors")
    pipe.load_textual_inversion(str(tmp_path / "embedding.safetensors"))
    theirs = pipe.encode_prompt("a photo of a <concept>", "cpu", 1, False)[0]
    with torch.no_grad():
        ours = models.encode_prompts(["a photo of a <concept>"]).hidden_states
    effect = (ours - before).abs().max()
    assert effect > 0.1
    assert (ours - theirs).abs().max() < 1e-4


def test_alpha_carries_the_scale(tmp_path):
    """Without its alpha a LoRA would be read with scale 1, whatever alpha / rank it was trained with."""
    recipe = dataclasses.replace(TextBoost(), steps=1, batch_size=2, views=2, lora_rank=2, lora_alpha=6.0)
    models = small.models()
    concept = Concept(images=(torch.rand(3, 32, 32),), resolution=32)
    result = training.train(runs.Run(concept=concept, recipe=recipe), models, tmp_path)
    name = "lora_te_text_model_encoder_layers_1_self_attn_v_proj"
    layer = models.text_encoders[0].text_model.encoder.layers[1].self_attn.v_proj
    down, up, alpha = (result.lora[f"{name}.{part}"] for part in ("lora_down.weight", "lora_up.weight", "alpha"))
    x = torch.randn(5, 32)
    with torch.no_grad():
        assert torch.allclose(layer(x), layer.base_layer(x) + (alpha / len(down)) * x @ down.T @ up.T, atol=1e-5)
    assert alpha == 6.0 and down.shape == (2, 32)
