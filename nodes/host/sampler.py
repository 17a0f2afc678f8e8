"""Generates images of many prompts and seeds with the host's own sampler, as stock nodes would one by one."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from . import internals, session


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """KSampler's settings, the size of the images in pixels, and how many are sampled together."""

    seeds: tuple[int, ...]
    steps: int
    cfg: float
    sampler: str
    scheduler: str
    negative: str
    width: int
    height: int
    batch_size: int


def generate(
    model, clip, vae, prompts: Sequence[str], sampling: Sampling, on_step: Callable[[int], None]
) -> list[Tensor]:
    """Return images `[h, w, 3]` in 0..1: every prompt's seeds, prompt after prompt.

    All prompts of a seed start from the same latents, those of a KSampler with that seed and one image.

    Args:
        on_step: given the number of images that advanced one sampler step; may raise to interrupt.
    """
    negative, *positives = [encode(clip, text) for text in (sampling.negative, *prompts)]
    latents = [
        _latents(model, positive, negative, sampling.seeds[start : start + sampling.batch_size], sampling, on_step)
        for positive in positives
        for start in range(0, len(sampling.seeds), sampling.batch_size)
    ]
    return [image for batch in latents for image in _decoded(vae, batch)]


def encode(clip, prompt: str) -> list:
    """Return the conditioning that CLIPTextEncode returns for a prompt."""
    session.check_interrupted()
    return clip.encode_from_tokens_scheduled(clip.tokenize(prompt))


def empty_latents(model, height: int, width: int) -> Tensor:
    """Return zeros in the shape of a MODEL's latents of one image, `[1, 4, h / 8, w / 8]` of Stable Diffusion."""
    kind = model.model.latent_format
    sides = height // kind.spacial_downscale_ratio, width // kind.spacial_downscale_ratio
    frames = (1,) if kind.latent_dimensions == 3 else ()  # of families that share a video's autoencoder
    return torch.zeros(1, kind.latent_channels, *frames, *sides)


def start_latents(model, seeds: Sequence[int], sampling: Sampling) -> Tensor:
    """Return noise of each seed that depends on it alone, not on its neighbours in the batch."""
    empty = empty_latents(model, sampling.height, sampling.width)
    return torch.cat([internals.prepare_noise(empty, seed) for seed in seeds])


def _latents(model, positive, negative, seeds, sampling: Sampling, on_step) -> Tensor:
    def callback(step: int, *others) -> None:
        on_step(len(seeds))

    noise = start_latents(model, seeds, sampling)
    return internals.sample(
        model, noise, sampling.steps, sampling.cfg, sampling.sampler, sampling.scheduler, positive, negative,
        torch.zeros_like(noise), callback=callback, disable_pbar=True, seed=seeds[0],
    )  # fmt: skip


def _decoded(vae, latents: Tensor) -> Tensor:
    session.check_interrupted()
    decoded = vae.decode(latents).cpu().float()
    return decoded.reshape(-1, *decoded.shape[-3:])
