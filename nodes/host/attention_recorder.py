"""Records the attention of the host's own cross-attention layers while it samples."""

from collections.abc import Callable

from torch import Tensor

from ...trainers.reports import attention_maps
from ...trainers.training import cross_attention
from . import causal_adapters


class Recorder:
    """Replaces every cross-attention of the host by one that computes the same and records the words' probabilities."""

    def __init__(self, words: list[list[int]]):
        self.words = words
        self.maps: dict[tuple, Tensor] = {}  # the host's block -> [words, h, w]

    def on(self, model):
        """Return a clone of `model` whose attention is recorded."""
        clone = model.clone()
        replaced = model.model_options["transformer_options"].get("patches_replace", {}).get("attn2", {})
        for block in causal_adapters.block_names(model).values():
            earlier = replaced.get(block, replaced.get(block[:2]))
            clone.set_model_attn2_replace(self._at(block, earlier), *block)
        return clone

    def _at(self, block: tuple, earlier: Callable | None) -> Callable:
        """Return the replacement of one layer; an earlier one, of another pack, still computes the layer's output."""

        def attend(q: Tensor, k: Tensor, v: Tensor, options: dict) -> Tensor:
            weights = cross_attention.probabilities(q.float(), k.float(), options["n_heads"])
            self._record(block, weights, options)
            return earlier(q, k, v, options) if earlier else cross_attention.attended(weights, v)

        return attend

    def _record(self, block: tuple, weights: Tensor, options: dict) -> None:
        """Record the first pass only: guidance may run a second one, and batch the same prompt twice."""
        if block not in self.maps:
            size = options["activations_shape"][-2:]
            self.maps[block] = attention_maps.word_maps(weights[0], self.words, *size).cpu()
