"""Attaches to a CLIP what a LoRA cannot hold: placeholder tokens, their adapters, and fixed outputs.

All of it is attached to copies: the CLIP of the graph, and every other clone of it, stays unchanged.
"""

import copy
import logging
import re
from collections.abc import Collection
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from ...trainers.text import any_of, unknown_tokens
from . import causal_adapters, internals, session
from .causal_adapters import KEY, WordAdapters


@dataclass(frozen=True, kw_only=True)
class ClipAttachment:
    """Holds what is attached, by placeholder token and by text encoder ("clip_l", ...)."""

    tokens: dict[str, dict[str, Tensor]] = field(default_factory=dict)  # placeholder token -> encoder -> [n, d]
    fixed_outputs: dict[str, Tensor] = field(default_factory=dict)  # encoder -> [layers + 1, 77, d]
    adapters: dict[str, WordAdapters] = field(default_factory=dict)  # placeholder token -> its adapters
    patches: tuple[str, ...] = ()  # names of the host's objects that are patched for this


def of(clip) -> ClipAttachment:
    """Return what is attached to `clip`; an empty attachment for a CLIP that this pack did not make."""
    return clip.patcher.get_attachment(KEY) or ClipAttachment()


def attach(clip, carried: ClipAttachment):
    """Return a clone of `clip` with the placeholder tokens, adapters and fixed outputs of `carried`."""
    clone = clip.clone()
    clone.tokenizer = copy.copy(clip.tokenizer)
    for name in {encoder for vectors in carried.tokens.values() for encoder in vectors}:
        vectors = {token: v[name] for token, v in carried.tokens.items() if name in v}
        setattr(clone.tokenizer, name, _with_words(getattr(clip.tokenizer, name), vectors))
    patches = causal_adapters.text_patches(clone, carried.adapters)
    for name, outputs in carried.fixed_outputs.items():
        encoder = getattr(clip.cond_stage_model, name)
        forward = patches.get(f"{name}.forward", causal_adapters.method(encoder, "forward"))
        patches[f"{name}.forward"] = fixed_forward(encoder, outputs, forward)
    for earlier in of(clip).patches:
        clone.patcher.object_patches.pop(earlier, None)
    for target, patch in patches.items():
        clone.patcher.add_object_patch(target, patch)
    clone.patcher.set_attachments(KEY, replace(carried, patches=tuple(patches)))
    return clone


def _with_words(tokenizer, vectors: dict[str, Tensor]):
    """Return a copy of one of the host's tokenizers that maps placeholder tokens to `vectors`."""
    for name in ("tokenize_with_weights", "_try_get_embedding"):
        internals.part(tokenizer, name)  # without them the host would ignore the tokens silently
    knowing = copy.copy(tokenizer)
    knowing.placeholders = {token: (_file_name(token), v.clone()) for token, v in vectors.items()}
    knowing.embedding_directory = tokenizer.embedding_directory or []  # None would disable embeddings
    if not isinstance(tokenizer, PlaceholderWords):
        base = type(tokenizer)
        knowing.__class__ = type(f"Placeholder{base.__name__}", (PlaceholderWords, base), {})
    return knowing


def _file_name(token: str) -> str:
    """Return an embedding name for a placeholder token, in hexadecimal because the host cuts names at brackets."""
    return f"personalize-{token.encode().hex()}"


class PlaceholderWords:
    """Mixin for a host tokenizer that turns placeholder tokens into embeddings held in memory.

    The host's prompt syntax (weights, commas, long prompts) then works on them as on any embedding.
    """

    placeholders: dict[str, tuple[str, Tensor]]

    def tokenize_with_weights(self, text: str, return_word_ids: bool = False, **kwargs):
        _warn_of_unknown(text, self.placeholders)

        def embedding(found: re.Match) -> str:
            return f" embedding:{self.placeholders[found['token']][0]} " if found["token"] else found[0]

        # A token within the name of an embedding's file is part of that name.
        file, token = r"embedding:[^\s<\[()]+", rf"(?:embedding:)?(?P<token>{any_of(self.placeholders)})"
        text = re.sub(f"{file}|{token}", embedding, text)
        return super().tokenize_with_weights(text, return_word_ids, **kwargs)

    def _try_get_embedding(self, embedding_name: str):
        first, _, rest = embedding_name.partition(" ")
        for token, (name, vectors) in self.placeholders.items():
            if first in (name, token):
                return vectors, first, rest.strip()
        if not embedding_name.strip():  # of `embedding: <concept>`, where the token is an embedding of its own
            return None, "", ""
        return super()._try_get_embedding(embedding_name)


def _warn_of_unknown(prompt: str, known: Collection[str]) -> None:
    """Say in the log and on the running node which words of a prompt look like placeholder tokens and are none."""
    context = internals.get_executing_context()
    for word, nearest in unknown_tokens(prompt, known).items():
        sentence = (
            f"The prompt has {word}, which this CLIP has not learned: write {nearest}, the nearest that it knows."
        )
        logging.warning(sentence)
        if context:
            session.notices(context.node_id)(sentence)


def fixed_forward(encoder, outputs: Tensor, original):
    """Wrap the forward of one of the host's text encoders to replace the outputs of start token and empty prompt.

    Args:
        outputs: the fixed outputs, `[layers + 1, 77, d]`, for whichever layer the graph reads; after the final norm
            if the norm follows every layer that is read.
    """
    end = encoder.special_tokens["end"]

    def forward(tokens, *args, **kwargs):
        hidden, pooled, *rest = original(tokens, *args, **kwargs)
        fixed = (_last(encoder, outputs) if encoder.layer == "last" else outputs[encoder.layer_idx]).to(hidden)
        hidden[:, 0] = fixed[0]
        for row, ids in enumerate(tokens):
            if not torch.is_tensor(ids[1]) and ids[1] == end:
                hidden[row, : len(fixed)] = fixed
                pooled[row] = _pooled(encoder, outputs).to(pooled)
        return (hidden, pooled, *rest)

    return forward


def _last(encoder, outputs: Tensor) -> Tensor:
    """Return the last hidden state, `[77, d]`, after the final norm."""
    norm = encoder.transformer.text_model.final_layer_norm
    return outputs[-1] if encoder.layer_norm_hidden_state else norm(outputs[-1].to(norm.weight.device).float())


def _pooled(encoder, outputs: Tensor) -> Tensor:
    """Return the empty prompt's pooled output: the last layer at the first end token, through OpenCLIP's projection."""
    pooled = _last(encoder, outputs)[1:2]
    if encoder.return_projected_pooled:
        pooled = encoder.transformer.text_projection(pooled.to(encoder.transformer.text_projection.weight.device))
    return pooled[0]
