"""The losses, as functions of a `Prediction`. Each averages within a sample first, then over the batch."""

import torch
import torch.nn.functional as F
from torch import Tensor

from .objective import Prediction


def denoising(prediction: Prediction) -> Tensor:
    """Mean squared error of the prediction; under a mask, averaged over the masked area of each sample."""
    error = (prediction.model_pred - prediction.target).square().mean(dim=1, keepdim=True)
    mask = prediction.batch.masks
    if mask is None:
        return error.mean()
    area = mask.sum(dim=(1, 2, 3)).clamp(min=1e-6)  # an augmented view may have lost its subject: it then counts as 0
    return ((error * mask).sum(dim=(1, 2, 3)) / area).mean()


def knowledge_preservation(prediction: Prediction, encoders: slice = slice(None)) -> Tensor:
    """`mean(1 - cos(h_tuned, h_frozen))` over prompts, positions and those text encoders that train (TextBoost)."""
    tuned = prediction.preservation.parts
    frozen = prediction.batch.preservation_targets.split([part.shape[-1] for part in tuned], dim=-1)
    pairs = [*zip(tuned, frozen, strict=True)][encoders]
    return torch.stack([(1 - F.cosine_similarity(t.float(), f.float(), dim=-1)).mean() for t, f in pairs]).mean()
