"""A digest of the weights that a run starts from."""

import torch

from ..digest import digest_of, sampled
from .diffusion import Models


def fingerprint(models: Models) -> str:
    """A digest of the weights that a run starts from, and of what was learned earlier in the graph."""
    words = [models.family.name, models.prediction_type, models.device.type]
    words += [str(encoder.layer) for encoder in models.text_encoders]
    tensors = [models.alphas_cumprod]
    for module in (models.unet, *models.text_encoders):
        tensors += [sampled(p) for p in module.parameters()]
    for encoder in models.text_encoders:
        words += encoder.known_tokens
        tensors += encoder.known_tokens.values()
        tensors += [] if encoder.fixed_outputs is None else [encoder.fixed_outputs]
    for placeholder, adapters in models.known_adapters.items():
        words += [placeholder, *adapters]
        tensors += adapters.values()
    return digest_of(tensors, words)


def starting_point(models: Models, device: torch.device) -> str:
    """A digest of what a run starts from and of the kind of device it runs on, whoever read the models, from where."""
    return digest_of([], [fingerprint(models), device.type])


@torch.no_grad()
def encoded_sample(models: Models) -> list[float]:
    """What the autoencoder, which is a function and has no weights to look at, makes of one small picture: 16 values.

    Two libraries give the same but for rounding; two autoencoders do not.
    """
    x, y = torch.meshgrid(torch.linspace(0, 1, 64), torch.linspace(1, 0, 64), indexing="xy")
    mean, _ = models.encode_images(torch.stack([x, y, x * y])[None].to(models.device))
    return mean[0, :, ::4, ::4].flatten().tolist()
