"""`Models` from a single-file SD 1.x checkpoint in safetensors, without the host.

For the command line, benchmarks and tests. Inside ComfyUI the weights come down the graph instead.
"""

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from .families import SD1
from .models import DecodeLatents, EncodeImages, Models, TextEncoder, build_text_encoder, build_unet
from .tokenizer import Tokenizer, bundled_words

SD1_UNET = {
    "in_channels": 4,
    "out_channels": 4,
    "model_channels": 320,
    "channel_mult": [1, 2, 4, 4],
    "num_res_blocks": [2, 2, 2, 2],
    "transformer_depth": [1, 1, 1, 1, 1, 1, 0, 0],
    "transformer_depth_middle": 1,
    "num_heads": 8,
    "context_dim": 768,
    "use_linear_in_transformer": False,
}


def load_models(path: str | Path, unet_config: dict | None = None, heads: int = 12) -> Models:
    """Read a checkpoint.

    Args:
        unet_config: the U-Net's layout in LDM's words; by default SD 1.x's.
        heads: attention heads of the text encoder.

    Raises:
        ValueError: the file is no SD 1.x checkpoint.
    """
    state = load_file(path)
    unet = _part(state, "model.diffusion_model.")
    text = _part(state, "cond_stage_model.transformer.")
    if not unet or not text:
        raise ValueError(f"{Path(path).name} is no SD 1.x checkpoint: it lacks a U-Net or CLIP-L's text encoder.")
    encode_images, decode_latents = build_vae(_part(state, "first_stage_model."))
    tokenizer = Tokenizer(bundled_words())
    return Models(
        family=SD1,
        text_encoders=(TextEncoder(build_text_encoder(text, heads=heads), tokenizer),),
        unet=build_unet(unet, unet_config or SD1_UNET),
        alphas_cumprod=scaled_linear(),
        prediction_type="epsilon",
        encode_images=encode_images,
        decode_latents=decode_latents,
    )


def scaled_linear(start: float = 0.00085, end: float = 0.012, steps: int = 1000) -> Tensor:
    """Stable Diffusion's cumulative alphas: betas evenly spaced in their square root."""
    betas = torch.linspace(start**0.5, end**0.5, steps, dtype=torch.float64) ** 2
    return torch.cumprod(1 - betas, dim=0).float()


def build_vae(state: dict[str, Tensor]) -> tuple[EncodeImages, DecodeLatents]:
    """The two functions of a checkpoint's autoencoder, in the scale the U-Net sees."""
    return _tiny_vae(state) if "taesd_decoder.1.weight" in state else _kl_vae(state)


def _kl_vae(state: dict[str, Tensor]) -> tuple[EncodeImages, DecodeLatents]:
    from diffusers import AutoencoderKL
    from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint

    channels = (128, 256, 512, 512)
    config = dict(block_out_channels=channels, layers_per_block=2, latent_channels=4)
    config |= dict(down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4)
    vae = AutoencoderKL(**config).requires_grad_(False).eval()
    vae.load_state_dict(convert_ldm_vae_checkpoint({f"first_stage_model.{k}": v for k, v in state.items()}, vae.config))

    def encode(pixels: Tensor) -> tuple[Tensor, Tensor]:
        posterior = vae.to(pixels.device).encode(pixels * 2 - 1).latent_dist
        return posterior.mean * SD1.latent_scale, posterior.std * SD1.latent_scale

    def decode(latents: Tensor) -> Tensor:
        return (vae.to(latents.device).decode(latents / SD1.latent_scale).sample / 2 + 0.5).clamp(0, 1)

    return encode, decode


def _tiny_vae(state: dict[str, Tensor]) -> tuple[EncodeImages, DecodeLatents]:
    from diffusers import AutoencoderTiny

    vae = AutoencoderTiny(latent_channels=4).requires_grad_(False).eval()
    encoder = {f"encoder.layers.{k}": v for k, v in _part(state, "taesd_encoder.").items()}
    # The decoder's clamp is layer 0 there and no layer here.
    decoder = {}
    for key, value in _part(state, "taesd_decoder.").items():
        number, rest = key.split(".", 1)
        decoder[f"decoder.layers.{int(number) - 1}.{rest}"] = value
    vae.load_state_dict(encoder | decoder)
    scale, shift = float(state.get("vae_scale", 1.0)), float(state.get("vae_shift", 0.0))

    def encode(pixels: Tensor) -> tuple[Tensor, None]:
        latents = vae.to(pixels.device).encode(pixels * 2 - 1).latents
        return (latents / scale + shift) * SD1.latent_scale, None

    def decode(latents: Tensor) -> Tensor:
        raw = (latents / SD1.latent_scale - shift) * scale
        return (vae.to(latents.device).decode(raw).sample / 2 + 0.5).clamp(0, 1)

    return encode, decode


def _part(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
