"""Reads the attention of the host's own cross-attention layers while it samples."""

from collections.abc import Callable

from torch import Tensor

from ...trainers.reports import attention_maps as pictures
from ...trainers.training import cross_attention
from . import causal_adapters


class Recorder:
    """The host's replacement of every cross-attention: it computes the same, and keeps the words' probabilities."""

    def __init__(self, words: list[list[int]]):
        self.words = words
        self.maps: dict[tuple, Tensor] = {}  # the host's block -> [words, h, w]

    def on(self, model):
        """A clone of `model` that is recorded."""
        clone = model.clone()
        replaced = model.model_options["transformer_options"].get("patches_replace", {}).get("attn2", {})
        for block in causal_adapters.block_names(model).values():
            earlier = replaced.get(block, replaced.get(block[:2]))
            clone.set_model_attn2_replace(self._at(block, earlier), *block)
        return clone

    def _at(self, block: tuple, earlier: Callable | None) -> Callable:
        """Another pack's replacement still says what the layer gives."""

        def attend(q: Tensor, k: Tensor, v: Tensor, options: dict) -> Tensor:
            weights = cross_attention.probabilities(q.float(), k.float(), options["n_heads"])
            self._keep(block, weights, options)
            return earlier(q, k, v, options) if earlier else cross_attention.attended(weights, v)

        return attend

    def _keep(self, block: tuple, weights: Tensor, options: dict) -> None:
        """Of the first look only, if a guidance looks twice; beside the prompt it sees the same prompt again."""
        if block not in self.maps:
            size = options["activations_shape"][-2:]
            self.maps[block] = pictures.word_maps(weights[0], self.words, *size).cpu()
