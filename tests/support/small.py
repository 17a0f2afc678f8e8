"""Small random models for tests of the trainers, built from diffusers and transformers alone. No test in here."""

import copy
import functools

import torch
import torch.nn.functional as F

from ...trainers.models.checkpoint import scaled_linear
from ...trainers.models.diffusion import Models, diffusers_unet_config
from ...trainers.models.families import SD1, SD2, SDXL
from ...trainers.models.text_encoder import TextEncoder
from ...trainers.models.tokenizer import END, Tokenizer, bundled_words

# For knowledge preservation: tokenizing and encoding those of the pack takes longer than a short training.
CAPTIONS = ("a red ball on the grass", "two cats", "an old house", "a man who reads", "snow in a forest", "a blue car")
PADDING = {SD1.name: (END,), SD2.name: (0,), SDXL.name: (END, 0)}
WIDTHS = {SD1.name: (32,), SD2.name: (32,), SDXL.name: (32, 48)}
UNET = {
    "in_channels": 4,
    "out_channels": 4,
    "model_channels": 32,
    "channel_mult": [1, 2],
    "num_res_blocks": [1, 1],
    "transformer_depth": [1, 1],
    "transformer_depth_middle": 1,
    "num_heads": 4,
    "context_dim": 32,
    "use_linear_in_transformer": False,
}


@functools.cache
def _weights(name):
    """Seeded weights of a family, made once: every call to `models` copies them."""
    from diffusers import UNet2DConditionModel

    widths = WIDTHS[name]
    pooled = {"adm_in_channels": widths[-1] + 6 * 256} if name == SDXL.name else {}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        unet = UNet2DConditionModel(**diffusers_unet_config({**UNET, "context_dim": sum(widths), **pooled}))
        texts = [_text_encoder(width) for width in widths]
        torch.manual_seed(0)
        for text, width in zip(texts, widths, strict=True):
            _draw(text, width)
        return unet, texts, torch.randn(widths[-1], widths[-1]) / widths[-1] ** 0.5


def _text_encoder(width):
    from transformers import CLIPTextConfig, CLIPTextModel

    config = CLIPTextConfig(
        vocab_size=49408,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=77,
        bos_token_id=49406,
        eos_token_id=49407,
    )
    return CLIPTextModel(config)


@torch.no_grad()
def _draw(text, width):
    """Draws the matrices of a text encoder again: each version of transformers draws them in another order."""
    deviations = {"embedding": 0.02, "out_proj": width**-0.5, "fc1": (2 * width) ** -0.5}
    for name, parameter in text.named_parameters():
        if parameter.dim() == 2:
            parameter.normal_(std=next((std for word, std in deviations.items() if word in name), width**-0.5 / 2))


def models(prediction_type="epsilon", family=SD1):
    """Fresh `Models` with the same weights every time; the autoencoder averages 8 x 8 pixels."""
    unet, texts, projection = _weights(family.name)
    unet, *texts = (copy.deepcopy(m).requires_grad_(False).eval() for m in (unet, *texts))
    projections = [None] * (len(texts) - 1) + [projection.clone() if family.pooled else None]
    padded = [Tokenizer(bundled_words(), pad_token_id=padding) for padding in PADDING[family.name]]
    return Models(
        family=family,
        text_encoders=tuple(
            TextEncoder(text, words, family.layer, final_norm=family.final_norm, projection=projection)
            for text, words, projection in zip(texts, padded, projections, strict=True)
        ),
        unet=unet,
        alphas_cumprod=scaled_linear(),
        prediction_type=prediction_type,
        encode_images=_encode,
        decode_latents=lambda latents: F.interpolate(latents[:, :3] / 4 + 0.5, scale_factor=8).clamp(0, 1),
    )


def _encode(pixels):
    latents = F.avg_pool2d(pixels, 8) * 4 - 2
    mean = torch.cat([latents, latents.mean(dim=1, keepdim=True)], dim=1)
    return mean, torch.full_like(mean, 0.01)
