"""The samples of one step, as tensors."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial

import torch
from torch import Tensor

from ..models.diffusion import Encoding


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Samples of one step: B of them and, for losses on the text encoder alone, P preservation prompts.

    Samples are images of the instance and, for prior preservation, of its class. `weights` says how much each counts
    as the one and as the other, so that means over shares of a batch add up to those over the whole batch.
    """

    latents: Tensor  # [B, 4, h, w], scaled as the U-Net sees them
    input_ids: Tensor  # [B, E, 77], one row of ids for each of E text encoders
    masks: Tensor | None = None  # [B, 1, h, w] in 0..1
    posterior: Tensor | None = None  # [B, 8, h, w], mean and deviation that `latents` were drawn with, if they were
    preservation_ids: Tensor | None = None  # [P, E, 77]
    preservation_targets: Tensor | None = None  # [P, 77, d], the frozen encoders' joined outputs
    weights: Tensor | None = None  # [B, 2], as instance and as class; of the whole batch both columns' means are 1
    encoding: Encoding | None = None  # of `input_ids`, where it is known already

    def __len__(self) -> int:
        return len(self.latents)

    def map(self, function: Callable[[Tensor], Tensor]) -> "Batch":
        """Return the batch with `function` applied to every tensor."""
        held = {f.name: value for f in fields(self) if (value := getattr(self, f.name)) is not None}
        mapped: dict = {n: v.map(function) if isinstance(v, Encoding) else function(v) for n, v in held.items()}
        return replace(self, **mapped)

    @classmethod
    def joined(cls, batches: Sequence["Batch"]) -> "Batch":
        """Join several batches that have the same tensors, of the same shapes."""
        held = [f.name for f in fields(cls) if getattr(batches[0], f.name) is not None]
        joined: dict = {name: torch.cat([getattr(batch, name) for batch in batches]) for name in held}
        return cls(**joined)

    def instances(self) -> "Batch":
        """Return the images of the subject alone, without class images and preservation prompts."""
        plain = replace(self, preservation_ids=None, preservation_targets=None, weights=None)
        if self.weights is None:
            return plain
        subject = self.weights[:, 0] > 0
        return plain.map(lambda t: t[subject])

    def with_class(self, classes: "Batch") -> "Batch":
        """Append the class images `classes`, which together count as much as the subject's images together."""
        sizes = len(self), len(classes)
        masks = None if self.masks is None else self.masks.new_ones(len(classes), *self.masks.shape[1:])
        kinds = zip((self.instances(), replace(classes, masks=masks)), sizes, torch.eye(2), strict=True)
        both = [replace(kind, weights=(sum(sizes) / n * column).repeat(n, 1)) for kind, n, column in kinds]
        preserved = {name: getattr(self, name) for name in ("preservation_ids", "preservation_targets")}
        return replace(Batch.joined(both), **preserved)

    def split(self, parts: int) -> list["Batch"]:
        """Split into `parts` shares, so that means over the shares add up to the mean over the batch."""
        return [self.map(partial(share, parts=parts, i=i)) for i in range(parts)]


def share(tensor: Tensor, parts: int, i: int) -> Tensor:
    """Return the i-th of `parts` shares of a tensor's first axis."""
    return tensor.tensor_split(parts)[i]
