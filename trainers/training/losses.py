"""Losses, as functions of a `Prediction`. Each averages within a sample first, then over the batch."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..models.text_encoder import one_of
from .cross_attention import AttentionMaps
from .objective import Prediction


def denoising(prediction: Prediction) -> Tensor:
    """Return the mean squared error `|target - prediction|^2` over the images of the instance, a scalar.

    With masks it is averaged over the masked area of each sample.
    """
    weights = prediction.batch.weights
    errors = _errors(prediction)
    return errors.mean() if weights is None else (errors * weights[:, 0]).mean()


def prior_preservation(prediction: Prediction) -> Tensor:
    """Return the mean squared error over the class images, a scalar (DreamBooth, arXiv 2208.12242)."""
    weights = prediction.batch.weights
    assert weights is not None  # the stage's batches have class images
    return (_errors(prediction) * weights[:, 1]).mean()


def _errors(prediction: Prediction) -> Tensor:
    """Return squared errors; with masks or weights their mean within each of the B samples, `[B]`."""
    error = (prediction.model_pred - prediction.target).square().mean(dim=1, keepdim=True)
    mask = prediction.batch.masks
    if mask is None:
        return error if prediction.batch.weights is None else error.mean(dim=(1, 2, 3))
    area = mask.sum(dim=(1, 2, 3)).clamp(min=1e-6)  # a view without its subject counts as 0
    return (error * mask).sum(dim=(1, 2, 3)) / area


def knowledge_preservation(prediction: Prediction, encoders: slice = slice(None)) -> Tensor:
    """Return `mean(1 - cos(h_tuned, h_frozen))` over prompts, positions and the text encoders that train.

    TextBoost, arXiv 2409.08248.
    """
    targets = prediction.batch.preservation_targets
    assert prediction.preservation is not None and targets is not None  # the stage's batches have such prompts
    tuned = prediction.preservation.parts
    frozen = targets.split([part.shape[-1] for part in tuned], dim=-1)
    pairs = [*zip(tuned, frozen, strict=True)][encoders]
    return torch.stack([(1 - F.cosine_similarity(t.float(), f.float(), dim=-1)).mean() for t, f in pairs]).mean()


@dataclass(frozen=True, kw_only=True)
class AttentionRegularization:
    """`sum over samples of mean over V's vectors v of (s_v - s_C)^2`, averaged over layers, for a statistic s.

    AttnDreamBooth, arXiv 2406.05000. V is the placeholder token, C the class word behind it; s is the mean or the
    variance of the cross-attention probabilities over heads and positions of the image, of C averaged over its tokens.
    Both sides carry gradient.

    Attributes:
        maps: statistics of the pass through the U-Net that the prediction comes from.
        statistic: "means" or "variances".
        placeholder: ids of V.
        class_word: ids of C that count: its first, or all.
        batch_size: samples of the whole batch; the sum is this number times the mean, so that a batch may be split.
    """

    maps: AttentionMaps
    statistic: str
    placeholder: tuple[int, ...]
    class_word: tuple[int, ...]
    batch_size: int

    def __call__(self, prediction: Prediction) -> Tensor:
        v, c = positions(prediction.batch.input_ids[:, -1], self.placeholder, self.class_word)
        layers = getattr(self.maps, self.statistic).values()
        distances = [_averaged((layer - _averaged(layer, c)[:, None]).square(), v).mean() for layer in layers]
        return self.batch_size * torch.stack(distances).mean()


def positions(input_ids: Tensor, placeholder: tuple[int, ...], class_word: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Return where V and C stand in prompts `[B, 77]`: two masks of 0 and 1, `[B, 77]`.

    C is the first occurrence of its ids behind V; a prompt that lacks either has zeros in both.
    """
    v = one_of(input_ids, placeholder)
    found = torch.ones_like(v)
    for offset, token in enumerate(class_word):
        found &= input_ids.roll(-offset, dims=1) == token
    found &= v.cumsum(dim=1) > 0
    first = found & (found.cumsum(dim=1) == 1)
    c = torch.zeros_like(v)
    for offset in range(len(class_word)):
        c |= first.roll(offset, dims=1)
    both = v.any(dim=1, keepdim=True) & first.any(dim=1, keepdim=True)
    return (v & both).float(), (c & both).float()


def _averaged(values: Tensor, mask: Tensor) -> Tensor:
    """Average `[B, 77]` over the positions of a mask, `[B]`; 0 where it is empty."""
    return (values * mask).sum(dim=1) / mask.sum(dim=1).clamp(min=1)
