"""Pictures through the autoencoder where memory is short."""

import contextlib

import torch
from torch import Tensor

from ..device import is_out_of_memory
from .diffusion import Models


class Encoder:
    """The models' autoencoder, and how it makes do where memory runs out.

    It then takes half of the pictures after the other; for one picture the U-Net leaves the device, until `stack` is
    left.
    """

    def __init__(self, models: Models, stack: contextlib.ExitStack):
        self.models, self.stack, self.device = models, stack, models.device
        self.alone = False

    def __call__(self, pixels: Tensor) -> tuple[Tensor, Tensor | None]:
        """Mean and deviation, on the CPU."""
        try:
            mean, std = self.models.encode_images(pixels.to(self.device))
            return mean.float().cpu(), None if std is None else std.float().cpu()
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error) or (len(pixels) == 1 and self.alone):
                raise
        if len(pixels) > 1:
            means, stds = zip(*map(self, pixels.tensor_split(2)), strict=True)
            return torch.cat(means), None if stds[0] is None else torch.cat(stds)
        self.alone = True
        self.stack.enter_context(self.models.unet_aside())
        return self(pixels)
