"""Augmented views of the references, encoded once by the model's autoencoder."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from ..images import check_pixels
from ..models.diffusion import Models
from ..models.encoding import Encoder

MOST_ENCODED = 2**35  # pixels of images whose latents are kept: half a byte for each, 17 GB


@dataclass(frozen=True, kw_only=True)
class View:
    """One augmented image, its mask and the names of the operations it went through."""

    pixels: Tensor  # [3, h, w] in 0..1
    mask: Tensor | None  # [1, h, w]
    operations: tuple[str, ...] = ()
    image: int = 0  # index of the reference image that it shows


@dataclass(frozen=True, kw_only=True)
class Latents:
    """Encoded views. Where the autoencoder has a deviation, every use samples the latents again from it."""

    mean: Tensor  # [n, 4, h, w]
    std: Tensor | None
    masks: Tensor | None  # [n, 1, h, w]
    operations: tuple[tuple[str, ...], ...]
    images: tuple[int, ...]  # index of the reference image that each view shows

    def sample(self, indices: Tensor, generator: Generator) -> Tensor:
        """Return latents `[n, 4, h, w]` of the views `indices`."""
        mean = self.mean[indices]
        return mean if self.std is None else mean + self.std[indices] * torch.randn(mean.shape, generator=generator)

    def posterior(self, indices: Tensor) -> Tensor | None:
        """Return mean and deviation `[n, 8, h, w]` of the views; `None` without a deviation."""
        return None if self.std is None else torch.cat([self.mean[indices], self.std[indices]], dim=1)


@torch.no_grad()
def encode_views(models: Models, views: Iterator[View], count: int, batch_size: int = 8) -> Latents:
    """Encode the next `count` views, all of one size, with the model's autoencoder, onto the CPU."""
    means, stds, masks, operations, images = [], [], [], [], []
    with contextlib.ExitStack() as stack:
        encode = Encoder(models, stack)
        for start in range(0, count, batch_size):
            chunk = [next(views) for _ in range(min(batch_size, count - start))]
            if not start:
                check_pixels(count * chunk[0].pixels[0].numel(), f"The {count} images to encode", MOST_ENCODED)
            mean, std = encode(torch.stack([view.pixels for view in chunk]))
            means.append(mean)
            stds += [] if std is None else [std]
            masks += [F.interpolate(v.mask[None], mean.shape[-2:], mode="area") for v in chunk if v.mask is not None]
            operations += [view.operations for view in chunk]
            images += [view.image for view in chunk]
    latents = torch.cat(means).cpu()
    if not latents.isfinite().all():
        raise ValueError(
            "The autoencoder makes NaN or infinite values of an image: load another VAE, or run it in float32 "
            "(--fp32-vae of ComfyUI)."
        )
    return Latents(
        mean=latents,
        std=torch.cat(stds).cpu() if stds else None,
        masks=torch.cat(masks).cpu() if masks else None,
        operations=tuple(operations),
        images=tuple(images),
    )
