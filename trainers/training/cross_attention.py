"""Cross-attention of a U-Net: statistics of its probabilities by layer, and positions without gradient.

For the statistics cross-attention is computed unfused, with its 77 keys; self-attention stays fused.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from einops import rearrange
from torch import Tensor, nn

if TYPE_CHECKING:
    from diffusers.models.attention_processor import Attention


def probabilities(q: Tensor, k: Tensor, heads: int) -> Tensor:
    """Return `softmax(q k^T / sqrt(d))` in float32, `[batch, heads, pixels, tokens]`.

    Args:
        q, k: `[batch, length, heads * d]`.
    """
    q, k = (_by_head(x, heads) for x in (q, k))
    return (q @ k.mT * q.shape[-1] ** -0.5).float().softmax(dim=-1)


def attended(weights: Tensor, v: Tensor) -> Tensor:
    """Return a layer's output for these probabilities, `[batch, pixels, heads * d]`."""
    return rearrange(weights.to(v.dtype) @ _by_head(v, weights.shape[1]), "b h n d -> b n (h d)")


def _by_head(x: Tensor, heads: int) -> Tensor:
    return rearrange(x, "b n (h d) -> b h n d", h=heads)


@dataclass
class AttentionMaps:
    """Statistics of the last pass through the U-Net, by the path of each cross-attention, in order of execution.

    The second pass through a block that gradient checkpointing makes writes the same values again.
    """

    means: dict[str, Tensor] = field(default_factory=dict)  # [B, 77], over heads and positions of the image
    variances: dict[str, Tensor] = field(default_factory=dict)  # [B, 77], unbiased, over the same
    keep: bool = False  # also record the maps themselves, which cost memory
    maps: dict[str, Tensor] = field(default_factory=dict)  # [B, h * w, 77], over heads

    def clear(self) -> None:
        """Drop the statistics, whose gradient would keep the pass's activations in memory."""
        for found in (self.means, self.variances, self.maps):
            found.clear()


class _Recording:
    """An attention processor of diffusers that records its probabilities in `maps`."""

    def __init__(self, path: str, maps: AttentionMaps):
        self.path, self.maps = path, maps

    def __call__(
        self, attn: "Attention", hidden_states: Tensor, encoder_hidden_states: Tensor, attention_mask=None
    ) -> Tensor:
        query, key = attn.to_q(hidden_states), attn.to_k(encoder_hidden_states)
        weights = probabilities(query, key, attn.heads)
        self._record(weights)
        return attn.to_out[1](attn.to_out[0](attended(weights, attn.to_v(encoder_hidden_states))))

    def _record(self, weights: Tensor) -> None:
        """Record statistics of probabilities `[B, heads, h * w, 77]`."""
        self.maps.means[self.path] = weights.mean(dim=(1, 2))
        self.maps.variances[self.path] = weights.var(dim=(1, 2))
        if self.maps.keep:
            self.maps.maps[self.path] = weights.detach().mean(dim=1)


@contextlib.contextmanager
def record_cross_attention(unet: nn.Module, keep: bool = False) -> Iterator[AttentionMaps]:
    """Record statistics of every cross-attention of a diffusers U-Net while the block lasts."""
    maps = AttentionMaps(keep=keep)
    before = {path: module for path, module in unet.named_modules() if path.endswith(".attn2")}
    processors = {path: module.processor for path, module in before.items()}
    try:
        for path, module in before.items():
            module.processor = _Recording(path, maps)
        yield maps
    finally:
        for path, module in before.items():
            module.processor = processors[path]


def records_attention(unet: nn.Module) -> bool:
    """Return whether `record_cross_attention` is at work."""
    return any(isinstance(getattr(module, "processor", None), _Recording) for module in unet.modules())


@contextlib.contextmanager
def first_token_without_gradient(unet: nn.Module) -> Iterator[None]:
    """Let no cross-attention learn from the prompt's start token while the block lasts (Custom Diffusion).

    Keys and values stay as they are at all 77 positions; those of the first carry no gradient.
    """
    layers = [module for path, module in unet.named_modules() if path.endswith((".attn2.to_k", ".attn2.to_v"))]
    hooks = [layer.register_forward_hook(_without_first) for layer in layers]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _without_first(layer: nn.Module, inputs: tuple, output: Tensor) -> Tensor:
    """Detach the first position of keys or values `[B, 77, d]`."""
    return torch.cat([output[:, :1].detach(), output[:, 1:]], dim=1)
