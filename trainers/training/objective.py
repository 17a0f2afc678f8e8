"""The differentiable step: one module from a batch to named loss terms, for any method."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from ..data.batch import Batch
from ..models.diffusion import Encoding, Models


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """Inputs of a loss."""

    model_pred: Tensor  # [B, 4, h, w], float32
    target: Tensor  # [B, 4, h, w]
    timesteps: Tensor  # [B]
    batch: Batch
    encoding: Encoding  # of the B prompts
    preservation: Encoding | None = None  # of the P preservation prompts


Loss = Callable[[Prediction], Tensor]


class KnownPrompts:
    """Encodings of prompts by text encoders that do not train, each computed once.

    Args:
        encode: ids `[n, E, 77]` on the CPU to their encoding on the device.
    """

    def __init__(self, encode: Callable[[Tensor], Encoding]):
        self.encode = encode
        self.rows: dict[bytes, Encoding] = {}

    def fill(self, batch: Batch) -> Batch:
        """Return the batch with its encoding; unchanged if it has preservation prompts, for encoders that train."""
        if batch.preservation_ids is not None:
            return batch
        keys = [row.numpy().tobytes() for row in batch.input_ids]
        if not self.rows.keys() >= set(keys):
            encoding = self.encode(batch.input_ids)
            self.rows |= {key: encoding[i : i + 1].map(torch.clone) for i, key in enumerate(keys)}
        return replace(batch, encoding=Encoding.joined([self.rows[key] for key in keys]))


class Objective(nn.Module):
    """`forward(batch, noise, timesteps)` returns `{name: scalar}`, one entry per loss."""

    def __init__(self, models: Models, losses: dict[str, Loss]):
        super().__init__()
        self.models = models
        self.losses = losses
        # Registered so that a distributed wrapper finds the parameters.
        self.unet, self.text_encoders = models.unet, nn.ModuleList(models.text_encoders)

    def forward(self, batch: Batch, noise: Tensor, timesteps: Tensor) -> dict[str, Tensor]:
        prediction = self.predict(batch, noise, timesteps)
        return {name: loss(prediction) for name, loss in self.losses.items()}

    def predict(self, batch: Batch, noise: Tensor, timesteps: Tensor) -> Prediction:
        models, size = self.models, len(batch)
        ids = [ids for ids in (batch.input_ids, batch.preservation_ids) if ids is not None]
        # One pass through the text encoder for both kinds of prompt.
        encoding = batch.encoding or models.encode_ids(torch.cat(ids))
        noisy_latents = models.add_noise(batch.latents, noise, timesteps)
        return Prediction(
            model_pred=models.predict(noisy_latents, timesteps, encoding[:size]).float(),
            target=models.target(batch.latents, noise, timesteps),
            timesteps=timesteps,
            batch=batch,
            encoding=encoding[:size],
            preservation=encoding[size:] if batch.preservation_ids is not None else None,
        )
