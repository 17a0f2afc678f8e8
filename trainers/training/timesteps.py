"""Samplers of training timesteps: functions of the batch size that draw from a generator."""

from collections.abc import Callable

import torch
from torch import Generator, Tensor

from ..models.diffusion import Models


def uniform(alphas_cumprod: Tensor, generator: Generator) -> Callable[[int], Tensor]:
    """Return a sampler of timesteps `[n]`, all equally likely."""
    return lambda n: torch.randint(len(alphas_cumprod), (n,), generator=generator)


def logit_normal(count: int, generator: Generator) -> Callable[[int], Tensor]:
    """Return a sampler of timesteps `[n]` below `count`: `floor(count * sigmoid(z))` with z ~ normal(0, 1).

    Stable Diffusion 3's distribution for flow matching (arXiv 2403.03206): levels in the middle are the hardest.
    """
    return lambda n: (torch.randn(n, generator=generator).sigmoid() * count).long().clamp(max=count - 1)


def natural(models: Models, generator: Generator) -> Callable[[int], Tensor]:
    """Return the sampler of timesteps `[n]` that the model's kind is trained with."""
    if models.prediction_type == "flow":
        return logit_normal(len(models.alphas_cumprod), generator)
    return uniform(models.alphas_cumprod, generator)


def snr_probabilities(alphas_cumprod: Tensor) -> Tensor:
    """Return TextBoost's distribution (arXiv 2409.08248), `p(t) ~ max(log SNR) - log SNR(t)`, `[T]`.

    In float64 with sum 1; `SNR(t) = alpha_t / (1 - alpha_t)` with the cumulative alpha. Noisier steps, which decide
    layout and identity, are more likely; the cleanest step is never drawn. A zero terminal SNR counts as the
    smallest positive one, because its logarithm would take all of the probability.
    """
    alphas = alphas_cumprod.double()
    log_snr = alphas.log() - (1 - alphas).log()
    finite = log_snr[log_snr.isfinite()]
    weights = finite.max() - log_snr.clamp(min=finite.min())
    return weights / weights.sum()


def snr_weighted(alphas_cumprod: Tensor, generator: Generator) -> Callable[[int], Tensor]:
    """Return a sampler of timesteps `[n]` with `snr_probabilities` (TextBoost, arXiv 2409.08248)."""
    probabilities = snr_probabilities(alphas_cumprod)
    return lambda n: torch.multinomial(probabilities, n, replacement=True, generator=generator)
