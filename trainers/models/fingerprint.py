"""A digest of the weights that a run starts from."""

from ..digest import digest_of, sampled
from .diffusion import Models


def fingerprint(models: Models) -> str:
    """Return a digest of the weights that a run starts from, and of what was learned earlier in the graph."""
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
