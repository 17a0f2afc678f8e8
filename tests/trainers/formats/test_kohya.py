"""Files that travel: does diffusers read the LoRA and the embedding as what was trained? (The host: test_host.py.)"""

import dataclasses

import pytest
import torch
from safetensors.torch import load_file, save_file

from personalize.tests.support import small
from personalize.trainers.data.concept import Concept
from personalize.trainers.formats import kohya
from personalize.trainers.models.diffusion import Encoding
from personalize.trainers.models.families import SD1, SD2, SDXL
from personalize.trainers.recipes.textboost import TextBoost
from personalize.trainers.runs import train
from personalize.trainers.runs.run import Run


@pytest.fixture(params=[SD1, SD2, SDXL], ids=lambda family: family.name)
def trained(tmp_path, request):
    """Models after a short training of all text encoders with large steps and without fixed outputs, and its result."""
    models = small.models(family=request.param)
    recipe = TextBoost(
        steps=3,
        batch_size=2,
        views=4,
        lora_learning_rate=2e-2,
        fixed_outputs=False,
        augmentation_prompt="words",
        text_encoder="both",
        unet_lora_rank=2,
        unet_lora_learning_rate=0.1,
        captions=small.CAPTIONS,
    )
    concept = Concept(images=(torch.rand(3, 32, 32),), resolution=32, initializer_token="corgi dog")
    return models, train.train(Run(concept=concept, recipe=recipe), models, tmp_path)


def pipeline(comfyui, family, models=None):
    """A diffusers pipeline with the same base weights that the training started from, or with those of `models`."""
    from diffusers import AutoencoderTiny, DDIMScheduler, StableDiffusionPipeline, StableDiffusionXLPipeline

    models = models or small.models(family=family)
    parts = {"vae": AutoencoderTiny(), "unet": models.unet}
    parts["scheduler"] = DDIMScheduler(steps_offset=1, clip_sample=False)
    if family is SDXL:
        words = [tokenizer(comfyui, padding) for padding in small.PADDING[family.name]]
        text, projected = models.text_encoders[0].module, with_projection(models.text_encoders[1])
        return StableDiffusionXLPipeline(
            **parts, text_encoder=text, text_encoder_2=projected, tokenizer=words[0], tokenizer_2=words[1],
            force_zeros_for_empty_prompt=False, add_watermarker=False,
        )  # fmt: skip
    encoder = models.text_encoders[0]
    layers = encoder.text_model.encoder.layers
    del layers[len(encoder.layers_read) :]  # diffusers keeps SD 2.x's encoder without the layer that nobody reads
    return StableDiffusionPipeline(
        **parts,
        text_encoder=encoder.module,
        tokenizer=tokenizer(comfyui, *small.PADDING[family.name]),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def tokenizer(comfyui, padding):
    from transformers import CLIPTokenizer

    vocabulary, token = comfyui / "comfy" / "sd1_tokenizer", "!" if padding == 0 else "<|endoftext|>"
    return CLIPTokenizer.from_pretrained(vocabulary, model_max_length=77, pad_token=token)


def with_projection(encoder):
    """transformers' model of a text encoder whose pooled output is projected."""
    from transformers import CLIPTextModelWithProjection

    config = encoder.module.config
    config.projection_dim = len(encoder.projection)
    model = CLIPTextModelWithProjection(config).requires_grad_(False).eval()
    model.text_model.load_state_dict(encoder.text_model.state_dict())
    model.text_projection.weight.copy_(encoder.projection)
    return model


def encoded(pipe, prompt):
    """Hidden states and, of SDXL, the pooled output."""
    if hasattr(pipe, "text_encoder_2"):
        states, _, pooled, _ = pipe.encode_prompt(prompt, device="cpu", do_classifier_free_guidance=False)
        return states, pooled
    return pipe.encode_prompt(prompt, "cpu", 1, False)[0], None


def load_embedding(pipe, file):
    """As diffusers' users load it: of SDXL, each encoder's part by its name."""
    if not hasattr(pipe, "text_encoder_2"):
        return pipe.load_textual_inversion(str(file))
    for key, number in (("clip_l", ""), ("clip_g", "_2")):
        parts = {name: getattr(pipe, name + number) for name in ("text_encoder", "tokenizer")}
        pipe.load_textual_inversion(load_file(file)[key], token="<concept>", **parts)


@pytest.mark.comfy
def test_diffusers_loads_lora_and_embedding(trained, comfyui, tmp_path):
    models, result = trained
    save_file(kohya.embedding("<concept>", result.tokens["<concept>"]), tmp_path / "embedding.safetensors")
    pipe = pipeline(comfyui, models.family)
    before = encoded(pipe, "a photo of a corgi dog")[0]
    pipe.load_lora_weights(str(tmp_path), weight_name="lora.safetensors")
    load_embedding(pipe, tmp_path / "embedding.safetensors")
    theirs, pooled = encoded(pipe, "a photo of a <concept>")
    with torch.no_grad():
        ours = models.encode_prompts(["a photo of a <concept>"])
    assert (ours.hidden_states - before).abs().max() > 0.1
    difference = (ours.hidden_states - theirs).abs().max()
    print(f"{models.family.name}: text {difference:.1e}")
    assert difference < 1e-4
    assert pooled is None or (ours.pooled - pooled).abs().max() < 1e-4


@pytest.mark.comfy
def test_diffusers_computes_what_the_trained_unet_does(trained, comfyui, tmp_path):
    """With SDXL's pooled text and sizes in diffusers' own words."""
    models, result = trained
    pipe = pipeline(comfyui, models.family)
    latents, t = torch.randn(2, 4, 4, 8), torch.tensor([3, 801])
    context, pooled = torch.randn(2, 77, models.unet.config.cross_attention_dim), None
    added = {}
    if models.family.pooled:
        pooled = torch.randn(2, len(models.text_encoders[-1].projection))
        sizes = pipe._get_add_time_ids((32, 64), (0, 0), (32, 64), torch.float32, len(pooled[0])).expand(2, -1)
        added = {"added_cond_kwargs": {"text_embeds": pooled, "time_ids": sizes}}
    with torch.no_grad():
        ours = models.predict(latents, t, Encoding(parts=(context,), pooled=pooled))
        before = pipe.unet(latents, t, context, **added).sample
        pipe.load_lora_weights(str(tmp_path), weight_name="lora.safetensors")
        theirs = pipe.unet(latents, t, context, **added).sample
    print(f"{models.family.name}: U-Net {(ours - theirs).abs().max():.1e}")
    assert (ours - before).abs().max() > 0.02
    assert (ours - theirs).abs().max() < 1e-4


def test_alpha_carries_the_scale(tmp_path):
    """Without its alpha a LoRA would be read with scale 1, whatever alpha / rank it was trained with."""
    recipe = dataclasses.replace(TextBoost(), steps=1, batch_size=2, views=2, lora_rank=2, lora_alpha=6.0)
    models = small.models()
    concept = Concept(images=(torch.rand(3, 32, 32),), resolution=32)
    result = train.train(Run(concept=concept, recipe=recipe), models, tmp_path)
    name = "lora_te_text_model_encoder_layers_1_self_attn_v_proj"
    layer = models.text_encoders[0].text_model.encoder.layers[1].self_attn.v_proj
    down, up, alpha = (result.lora[f"{name}.{part}"] for part in ("lora_down.weight", "lora_up.weight", "alpha"))
    x = torch.randn(5, 32)
    with torch.no_grad():
        assert torch.allclose(layer(x), layer.base_layer(x) + (alpha / len(down)) * x @ down.T @ up.T, atol=1e-5)
    assert alpha == 6.0 and down.shape == (2, 32)
