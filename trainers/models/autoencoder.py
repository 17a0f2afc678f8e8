"""A checkpoint's autoencoder as two functions, pixels to latents and back, in the scale that the U-Net sees."""

import torch
from torch import Tensor

from .diffusion import DecodeLatents, EncodeImages


def build_vae(state: dict[str, Tensor], latent_scale: float) -> tuple[EncodeImages, DecodeLatents]:
    """Build encoder and decoder from weights in LDM's key names, without a prefix: an `AutoencoderKL`, or a TAESD."""
    return (_tiny_vae if "taesd_decoder.1.weight" in state else _kl_vae)(state, latent_scale)


def _kl_vae(state: dict[str, Tensor], latent_scale: float) -> tuple[EncodeImages, DecodeLatents]:
    from diffusers import AutoencoderKL
    from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint

    channels = (128, 256, 512, 512)
    config = dict(block_out_channels=channels, layers_per_block=2, latent_channels=4)
    config |= dict(down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4)
    with torch.device("meta"):  # no time and no memory for weights that are replaced at once
        vae = AutoencoderKL(**config)
    state = convert_ldm_vae_checkpoint({f"first_stage_model.{k}": v.float() for k, v in state.items()}, vae.config)
    vae.load_state_dict(state, assign=True)
    vae.requires_grad_(False).eval()

    def encode(pixels: Tensor) -> tuple[Tensor, Tensor]:
        posterior = vae.to(pixels.device).encode(pixels * 2 - 1).latent_dist
        return posterior.mean * latent_scale, posterior.std * latent_scale

    def decode(latents: Tensor) -> Tensor:
        return (vae.to(latents.device).decode(latents / latent_scale).sample / 2 + 0.5).clamp(0, 1)

    return encode, decode


def _tiny_vae(state: dict[str, Tensor], latent_scale: float) -> tuple[EncodeImages, DecodeLatents]:
    from diffusers import AutoencoderTiny

    with torch.device("meta"):
        vae = AutoencoderTiny(latent_channels=4)
    prefix = "taesd_encoder."
    encoder = {f"encoder.layers.{k.removeprefix(prefix)}": v for k, v in state.items() if k.startswith(prefix)}
    prefix, decoder = "taesd_decoder.", {}
    for key, value in state.items():
        if key.startswith(prefix):  # the decoder's clamp is layer 0 there and no layer here
            number, rest = key.removeprefix(prefix).split(".", 1)
            decoder[f"decoder.layers.{int(number) - 1}.{rest}"] = value
    vae.load_state_dict({key: value.float() for key, value in (encoder | decoder).items()}, assign=True)
    vae.requires_grad_(False).eval()
    scale, shift = float(state.get("vae_scale", 1.0)), float(state.get("vae_shift", 0.0))

    def encode(pixels: Tensor) -> tuple[Tensor, None]:
        latents = vae.to(pixels.device).encode(pixels * 2 - 1).latents
        return (latents / scale + shift) * latent_scale, None

    def decode(latents: Tensor) -> Tensor:
        raw = (latents / latent_scale - shift) * scale
        return (vae.to(latents.device).decode(raw).sample / 2 + 0.5).clamp(0, 1)

    return encode, decode
