"""A small sampler for previews and tests: DPM-Solver++ (2M) with classifier-free guidance and its own noise."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..device import is_out_of_memory
from ..images import check_pixels
from .diffusion import Models
from .flow import FlowModels

LEAST_ALPHA = 2**-25  # below what ComfyUI (4.9e-8) and diffusers (6e-8) put in the place of zero


def schedule(alphas_cumprod: Tensor, steps: int) -> Tensor:
    """Return `steps` timesteps from the noisiest down, evenly spaced."""
    last = len(alphas_cumprod) - 1
    return torch.linspace(last, last / steps, steps).round().long()


@torch.no_grad()
def sample(
    models: Models,
    prompts: Sequence[str],
    seeds: Sequence[int],
    *,
    size: tuple[int, int],
    steps: int = 20,
    guidance: float = 7.5,
    batch_size: int = 8,
) -> Tensor:
    """Generate images `[n, 3, *size]` in 0..1 on the CPU, one per prompt and seed.

    The noise of an image depends on its seed alone, never on its neighbours or on the global random state.
    """
    input_ids = models.tokenize([*prompts])
    options = {"size": size, "steps": steps, "guidance": guidance}
    return sample_as_fits(models, input_ids, seeds, batch_size=min(batch_size, len(seeds)), **options)


@torch.no_grad()
def sample_ids(
    models: Models,
    input_ids: Tensor,
    seeds: Sequence[int],
    *,
    size: tuple[int, int],
    steps: int,
    guidance: float,
    batch_size: int,
) -> Tensor:
    """Generate images as `sample` does, from prompts as ids `[n, E, 77]`, such as those of training batches."""
    if len(input_ids) != len(seeds):
        raise ValueError(f"{len(input_ids)} prompts but {len(seeds)} seeds: give one seed for each image.")
    check_pixels(len(seeds) * size[0] * size[1], f"The {len(seeds)} images to generate at once")
    parts = [slice(start, start + batch_size) for start in range(0, len(seeds), batch_size)]
    return torch.cat([_sample_chunk(models, input_ids[part], seeds[part], size, steps, guidance) for part in parts])


def sample_as_fits(
    models: Models, input_ids: Tensor, seeds: Sequence[int], batch_size: int | None = None, **options
) -> Tensor:
    """Generate images as `sample_ids` does; where memory runs out, with half the batch size, and so on."""
    at_once = batch_size or len(seeds)
    while True:
        try:
            return sample_ids(models, input_ids, seeds, **options, batch_size=at_once)
        except (MemoryError, RuntimeError) as error:
            if at_once <= 1 or not is_out_of_memory(error):
                raise
        at_once = -(-at_once // 2)


def _sample_chunk(models, input_ids, seeds, size: tuple[int, int], steps: int, guidance: float) -> Tensor:
    if isinstance(models, FlowModels):  # whoever hands over the transformer brings its sampler
        prompts = models.prompts_of(input_ids)
        return models.network.generate(prompts, seeds, size=size, steps=steps, guidance=guidance)
    shape = 4, size[0] // 8, size[1] // 8
    noise = [torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    latents = torch.stack(noise).to(models.device)
    empty = models.tokenize([""]).expand_as(input_ids)
    encoding = models.encode_ids(torch.cat([input_ids, empty]).to(models.device))

    def denoised(x: Tensor, t: Tensor) -> Tensor:
        timesteps = t.to(x.device).expand(2 * len(x))
        output = models.predict(torch.cat([x, x]), timesteps, encoding).float()
        conditional, unconditional = output.chunk(2)
        return clean(models, x, unconditional + guidance * (conditional - unconditional), t)

    return models.decode_latents(dpm_solver_2m(models.alphas_cumprod, latents, denoised, steps)).float().cpu()


def _signal_and_noise(alphas: Tensor) -> tuple[Tensor, Tensor]:
    """Return signal and noise shares in float64. A zero terminal SNR has no logarithm: it gets a little signal."""
    alphas = alphas.double().clamp(min=LEAST_ALPHA)
    return alphas.sqrt(), (1 - alphas).sqrt()


def clean(models: Models, x: Tensor, output: Tensor, t: Tensor) -> Tensor:
    """Return the clean latents that an epsilon or v output implies."""
    signal, sigma = (part.item() for part in _signal_and_noise(models.alphas_cumprod[t]))
    if models.prediction_type == "epsilon":
        return (x - sigma * output) / signal
    return signal * x - sigma * output


def dpm_solver_2m(alphas_cumprod: Tensor, x: Tensor, denoised, steps: int) -> Tensor:
    """Sample by DPM-Solver++ (2M), data prediction, in `lambda = log(signal / sigma)` (arXiv 2211.01095, algorithm 2).

    Ends with one first-order step to the clean latents.
    """
    timesteps = schedule(alphas_cumprod, steps)
    signal, sigma = (part.tolist() for part in _signal_and_noise(alphas_cumprod[timesteps]))
    lam = [torch.tensor(a / s).log().item() for a, s in zip(signal, sigma, strict=True)]
    previous = None
    for i, t in enumerate(timesteps):
        current = denoised(x, t)
        if i == steps - 1:
            return current
        h = lam[i + 1] - lam[i]
        data = current
        if previous is not None:
            r = (lam[i] - lam[i - 1]) / h
            data = (1 + 0.5 / r) * current - (0.5 / r) * previous
        x = sigma[i + 1] / sigma[i] * x - signal[i + 1] * torch.expm1(torch.tensor(-h)).item() * data
        previous = current
    return x
