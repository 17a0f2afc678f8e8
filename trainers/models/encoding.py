"""Encoding of images by the autoencoder, also where memory is short."""

import contextlib

import torch
from torch import Tensor

from ..device import is_out_of_memory
from .diffusion import Models


class Encoder:
    """Encodes with the models' autoencoder.

    Where memory runs out, it encodes half of the images after the other; for a single image the U-Net leaves the
    device until `stack` is left.
    """

    def __init__(self, models: Models, stack: contextlib.ExitStack):
        self.models, self.stack, self.device = models, stack, models.device
        self.alone = False

    def __call__(self, pixels: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return mean and deviation `[B, 4, H / 8, W / 8]` of pixels `[B, 3, H, W]`, on the models' device.

        Nothing waits for the device, which computes while the next pixels are made.
        """
        try:
            mean, std = self.models.encode_images(pixels.to(self.device))
            return mean.float(), None if std is None else std.float()
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error) or (len(pixels) == 1 and self.alone):
                raise
        if len(pixels) > 1:
            means, stds = zip(*map(self, pixels.tensor_split(2)), strict=True)
            return torch.cat(means), None if stds[0] is None else torch.cat(stds)
        self.alone = True
        self.stack.enter_context(self.models.unet_aside())
        return self(pixels)
