"""Models at the families' real shapes, with random weights: what benchmarks/step.py times. Nothing runs in here."""

from contextlib import contextmanager
from dataclasses import dataclass

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel

from trainers.models.checkpoint import HEAD_SIZE, SD1_UNET, SD2_UNET, SDXL_UNET, scaled_linear
from trainers.models.diffusion import Models, diffusers_unet_config
from trainers.models.families import SD1, SD2, SDXL, Family
from trainers.models.frozen import use_frozen_layers
from trainers.models.text_encoder import TextEncoder
from trainers.models.tokenizer import END, Tokenizer, bundled_words


@dataclass(frozen=True, kw_only=True)
class Shape:
    """A family's real sizes, and the card that its training should fit."""

    family: Family
    unet: dict  # in LDM's words
    text_encoders: tuple[tuple[int, int], ...]  # width and layers of each
    prediction_type: str = "epsilon"
    card: int  # GiB


SHAPES = {
    "sd15": Shape(family=SD1, unet=SD1_UNET, text_encoders=((768, 12),), card=6),
    "sd21": Shape(family=SD2, unet=SD2_UNET, text_encoders=((1024, 24),), prediction_type="v_prediction", card=6),
    "sdxl": Shape(family=SDXL, unet=SDXL_UNET, text_encoders=((768, 12), (1280, 32)), card=12),
}


@contextmanager
def default_dtype(dtype: torch.dtype):
    """New weights are made in `dtype`, without a copy in float32 before."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    yield
    torch.set_default_dtype(before)


def random_models(shape: Shape, device: torch.device, dtype: torch.dtype) -> Models:
    """U-Net and autoencoder in `dtype` and text encoders in float32, with random weights."""
    family = shape.family
    with torch.device(device), default_dtype(dtype):
        unet = use_frozen_layers(UNet2DConditionModel(**diffusers_unet_config(shape.unet)))
        channels = (128, 256, 512, 512)
        blocks = dict(down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4)
        vae = AutoencoderKL(block_out_channels=channels, layers_per_block=2, latent_channels=4, **blocks)

    def encode(pixels):
        posterior = vae.encode(pixels.to(device=device, dtype=dtype) * 2 - 1).latent_dist
        return posterior.mean * family.latent_scale, posterior.std * family.latent_scale

    for module in (unet, vae):
        module.requires_grad_(False).eval()
    return Models(
        family=family,
        text_encoders=tuple(random_text_encoder(family, *size, device) for size in shape.text_encoders),
        unet=unet,
        alphas_cumprod=scaled_linear(),
        prediction_type=shape.prediction_type,
        encode_images=encode,
        decode_latents=lambda latents: vae.decode(latents.to(dtype)).sample,
    )


def random_text_encoder(family: Family, width: int, layers: int, device: torch.device) -> TextEncoder:
    config = CLIPTextConfig(
        vocab_size=49408,
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=width // HEAD_SIZE,
        hidden_act="quick_gelu" if width == 768 else "gelu",
        eos_token_id=END,
    )
    with torch.device(device):
        module = CLIPTextModel(config).requires_grad_(False).eval()
        projection = torch.eye(width) if family.pooled and width == 1280 else None
    tokenizer = Tokenizer(bundled_words(), pad_token_id=END if width == 768 else 0)
    return TextEncoder(module, tokenizer, family.layer, final_norm=family.final_norm, projection=projection)
