"""The losses, as functions of a `Prediction`. Each averages within a sample first, then over the batch."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..models.text_encoder import one_of
from .cross_attention import AttentionMaps
from .objective import Prediction


def denoising(prediction: Prediction) -> Tensor:
    """Mean squared error of the prediction over the images of the instance.

    Under a mask, averaged over the masked area of each sample.
    """
    weights = prediction.batch.weights
    errors = _errors(prediction)
    return errors.mean() if weights is None else (errors * weights[:, 0]).mean()


def prior_preservation(prediction: Prediction) -> Tensor:
    """The same over the images of the class, without masks: what such a thing looked like before (DreamBooth)."""
    return (_errors(prediction) * prediction.batch.weights[:, 1]).mean()


def _errors(prediction: Prediction) -> Tensor:
    """Squared errors: their mean within each of the B samples, `[B]`, where masks or weights tell samples apart."""
    error = (prediction.model_pred - prediction.target).square().mean(dim=1, keepdim=True)
    mask = prediction.batch.masks
    if mask is None:
        return error if prediction.batch.weights is None else error.mean(dim=(1, 2, 3))
    area = mask.sum(dim=(1, 2, 3)).clamp(min=1e-6)  # an augmented view may have lost its subject: it then counts as 0
    return (error * mask).sum(dim=(1, 2, 3)) / area


def knowledge_preservation(prediction: Prediction, encoders: slice = slice(None)) -> Tensor:
    """`mean(1 - cos(h_tuned, h_frozen))` over prompts, positions and those text encoders that train (TextBoost)."""
    tuned = prediction.preservation.parts
    frozen = prediction.batch.preservation_targets.split([part.shape[-1] for part in tuned], dim=-1)
    pairs = [*zip(tuned, frozen, strict=True)][encoders]
    return torch.stack([(1 - F.cosine_similarity(t.float(), f.float(), dim=-1)).mean() for t, f in pairs]).mean()


@dataclass(frozen=True, kw_only=True)
class AttentionRegularization:
    """`sum over samples of (s_V - s_C)^2`, averaged over layers, for a statistic s of cross-attention (AttnDreamBooth).

    V is the placeholder token, C the class word behind it; s is the mean or the variance of the attention probabilities over
    heads and positions of the image, averaged over the tokens of V and of C. Both sides carry gradient.

    Attributes:
        maps: what the U-Net's cross-attentions looked at in the pass that the prediction comes from.
        statistic: "means" or "variances".
        placeholder: ids of V.
        class_word: ids of C that count: its first, or all.
        batch_size: samples of the whole batch: the sum is taken as that many times the mean, so that a batch may be
            split.
    """

    maps: AttentionMaps
    statistic: str
    placeholder: tuple[int, ...]
    class_word: tuple[int, ...]
    batch_size: int

    def __call__(self, prediction: Prediction) -> Tensor:
        word, noun = positions(prediction.batch.input_ids[:, -1], self.placeholder, self.class_word)
        layers = getattr(self.maps, self.statistic).values()
        distances = [(_averaged(layer, word) - _averaged(layer, noun)).square().mean() for layer in layers]
        return self.batch_size * torch.stack(distances).mean()


def positions(input_ids: Tensor, placeholder: tuple[int, ...], class_word: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Where V and C stand in prompts `[B, 77]`: two masks of 0 and 1 of the same shape.

    C is the first occurrence of its ids behind V; a prompt that lacks either has zeros in both.
    """
    word = one_of(input_ids, placeholder)
    found = torch.ones_like(word)
    for offset, token in enumerate(class_word):
        found &= input_ids.roll(-offset, dims=1) == token
    found &= word.cumsum(dim=1) > 0
    first = found & (found.cumsum(dim=1) == 1)
    noun = torch.zeros_like(word)
    for offset in range(len(class_word)):
        noun |= first.roll(offset, dims=1)
    both = word.any(dim=1, keepdim=True) & first.any(dim=1, keepdim=True)
    return (word & both).float(), (noun & both).float()


def _averaged(values: Tensor, mask: Tensor) -> Tensor:
    """`[B, 77]` averaged over the positions of a mask; 0 where it is empty."""
    return (values * mask).sum(dim=1) / mask.sum(dim=1).clamp(min=1)
