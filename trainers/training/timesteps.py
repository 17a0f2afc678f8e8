"""Samplers of training timesteps: functions of the batch size that draw from a generator."""

from collections.abc import Callable

import torch
from torch import Generator, Tensor


def uniform(alphas_cumprod: Tensor, generator: Generator) -> Callable[[int], Tensor]:
    """Return a sampler of timesteps `[n]`, all equally likely."""
    return lambda n: torch.randint(len(alphas_cumprod), (n,), generator=generator)


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
