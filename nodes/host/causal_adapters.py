"""Applies causality-preserved adapters, trained by trainers/training/causal_adapters.py, to the host's own modules.

The positions where a placeholder token's adapters act are known when its prompt is tokenized. The text encoder's
adapters use them there; for the U-Net's, the conditioning carries them, under the token's name, through the sampler to
every cross-attention.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from . import internals, models

KEY = "personalize"
TEXT, UNET = "text_encoders.", "unet."  # prefixes of adapter names, see trainers/training/causal_adapters.py


@dataclass(frozen=True)
class WordAdapters:
    """Holds the adapters of one placeholder token, and their strengths."""

    tensors: dict[str, Tensor]  # <name>.down [r, in] and <name>.up [out, r]
    strength_text_encoder: float = 1.0
    strength_unet: float = 1.0

    def whole(self) -> dict[str, Tensor]:
        """Return the tensors multiplied by the strengths."""
        whole = dict(self.tensors)
        for key in (key for key in self.tensors if key.endswith(".up")):
            whole[key] = whole[key] * (self.strength_unet if key.startswith(UNET) else self.strength_text_encoder)
        return whole

    def layers(self, prefix: str) -> dict[str, tuple[Tensor, Tensor]]:
        """Return down and up by name, for the names that begin with `prefix`, which is cut off."""
        names = {key.rpartition(".")[0] for key in self.tensors if key.startswith(prefix)}
        return {n.removeprefix(prefix): (self.tensors[f"{n}.down"], self.tensors[f"{n}.up"]) for n in sorted(names)}


def low_rank(x: Tensor, down: Tensor, up: Tensor) -> Tensor:
    """Multiply `x` `[..., in]` by `down` `[r, in]` and `up` `[out, r]`; returns `[..., out]`."""
    return x @ down.to(x).T @ up.to(x).T


def mask(rows: list, vectors: Tensor, end: int) -> Tensor:
    """Return 1 from a token's first vector to the first end token, 0 elsewhere; `[rows, tokens, 1]`.

    Args:
        rows: the host's tokens, one list per chunk of 77: ids, and the very `vectors` of learned tokens.
    """
    result = torch.zeros(len(rows), max(map(len, rows)), 1)
    for row, tokens in enumerate(rows):
        first = (i for i, t in enumerate(tokens) if torch.is_tensor(t) and t.data_ptr() == vectors.data_ptr())
        begin = next(first, len(tokens))
        ends = (i for i, t in enumerate(tokens) if not torch.is_tensor(t) and t == end)
        result[row, begin : next(ends, len(tokens)) + 1] = 1
    return result


@dataclass
class Pass:
    """Holds the state of the current pass through one of the host's text encoders."""

    masks: dict[str, Tensor] = field(default_factory=dict)  # placeholder token -> where its adapters act
    reached: set[str] = field(default_factory=set)  # the adapted layers that ran


def following(forward, vectors: dict[str, Tensor], end: int, current: Pass, layers: Iterable[str]):
    """Wrap the forward of one of the host's text encoders to note where each token acts and which `layers` ran.

    The wrapper raises `ValueError` if the host computed a layer without calling it, as it may with a quantized one,
    because its adapters then had no effect.
    """

    def follow(tokens, *args, **kwargs):
        current.masks.update({word: mask(tokens, learned, end) for word, learned in vectors.items()})
        current.reached.clear()
        output = forward(tokens, *args, **kwargs)
        if missed := sorted({*layers} - current.reached):
            raise ValueError(
                f"This CLIP skips the adapters that {', '.join(vectors)} has in {missed[0]}: load a CLIP in fp16, bf16 "
                "or fp32."
            )
        return output

    return follow


def adapted(linear, path: str, adapters: dict[str, tuple[Tensor, Tensor, float]], current: Pass):
    """Return a forward of the host's linear layer at `path` that adds each token's adapter: down, up and strength."""
    original = type(linear).forward

    def forward(x, **folded):
        current.reached.add(path)
        y = original(linear, x, **folded)
        x, scale = internals.linear_input(x, folded)
        for word, (down, up, strength) in adapters.items():
            y = y + strength * scale * current.masks[word].to(y) * low_rank(x, down, up)
        return y

    return forward


def text_patches(clip, words: dict[str, WordAdapters]) -> dict[str, Callable]:
    """Return object patches for a CLIP whose tokenizer has the placeholder tokens: adapters, and where they act."""
    patches: dict[str, Callable] = {}
    names = models.encoder_names(clip)
    for i, name in enumerate(names):
        encoder, current = getattr(clip.cond_stage_model, name), Pass()
        layers: dict[str, dict[str, tuple[Tensor, Tensor, float]]] = {}
        for word, adapters in words.items():
            for path, (down, up) in adapters.layers(f"{TEXT}{i}.").items():
                layers.setdefault(path, {})[word] = down, up, adapters.strength_text_encoder
        for path, of_words in layers.items():
            linear = internals.get_attr(text_model(clip, name), path)
            patches[f"{name}.transformer.text_model.{path}.forward"] = adapted(linear, path, of_words, current)
        if layers:
            vectors = _vectors(clip, name, words)
            patches[f"{name}.forward"] = following(method(encoder, "forward"), vectors, _end(encoder), current, layers)
    if any(adapters.layers(UNET) for adapters in words.values()):
        vectors = _vectors(clip, names[-1], words)
        patches["encode_token_weights"] = _with_masks(clip.cond_stage_model, names[-1], vectors)
    return patches


def method(module, name: str):
    """Return a method as its class defines it, whatever another clone has patched since."""
    return getattr(type(module), name).__get__(module)


def text_model(clip, name: str):
    return internals.part(getattr(clip.cond_stage_model, name), "transformer.text_model")


def _end(encoder) -> int:
    return internals.part(encoder, "special_tokens")["end"]


def _vectors(clip, name: str, words: dict[str, WordAdapters]) -> dict[str, Tensor]:
    placeholders = getattr(clip.tokenizer, name).placeholders
    return {word: placeholders[word][1] for word in words}


def _with_masks(stage, name: str, vectors: dict[str, Tensor]):
    """Wrap the host's prompt encoding to add to the conditioning where each token acts, `[1, tokens, 1]`."""
    encode, end = method(stage, "encode_token_weights"), _end(getattr(stage, name))

    def encoded(pairs):
        output = encode(pairs)
        chunks = [[token for token, *_ in chunk] for chunk in pairs[name.removeprefix("clip_")]]
        masks = {f"{KEY} {word}": mask(chunks, learned, end).reshape(1, -1, 1) for word, learned in vectors.items()}
        return (*output[:2], {**(output[2] if len(output) > 2 else {}), **masks})

    return encoded


@dataclass
class ContextAdapters:
    """Patches every cross-attention of the host to read `H + m * A(H)` instead of the prompt's hidden states H."""

    words: dict[str, WordAdapters]
    blocks: dict[tuple, dict[str, tuple[Tensor, Tensor, float]]] = field(init=False)
    names: dict[str, tuple]  # diffusers' path of a cross-attention -> the host's block

    def __post_init__(self):
        self.blocks = {}
        for word, adapters in self.words.items():
            for path, (down, up) in adapters.layers(UNET).items():
                self.blocks.setdefault(self.names[path], {})[word] = down, up, adapters.strength_unet

    def __call__(self, n: Tensor, context: Tensor, value: Tensor, options: dict) -> tuple[Tensor, Tensor, Tensor]:
        block, masks = (*options["block"], options["block_index"]), options.get(KEY, {})
        keys, values = context, value
        for word, (down, up, strength) in self.blocks.get(block, {}).items():
            if word in masks:
                keys = keys + _where(masks[word], keys) * strength * low_rank(context, down, up)
                values = values + _where(masks[word], values) * strength * low_rank(value, down, up)
        return n, keys, values


def _where(where: Tensor, context: Tensor) -> Tensor:
    """Pad a mask with 0 to the context's length, because a graph may concatenate prompts without the token."""
    missing = context.shape[1] - where.shape[1]
    return torch.nn.functional.pad(where.to(context), (0, 0, 0, missing)) if missing else where.to(context)


def attach_unet(model, words: dict[str, WordAdapters]):
    """Return a clone of `model` with these tokens' adapters before its cross-attentions, next to earlier tokens'."""
    words = {**(model.get_attachment(KEY) or {}), **words}
    words = {word: adapters for word, adapters in words.items() if adapters.layers(UNET)}
    earlier = model.model_options["transformer_options"].get("patches", {}).get("attn2_patch", [])
    if not words and not any(isinstance(patch, ContextAdapters) for patch in earlier):
        return model
    clone = model.clone()
    clone.set_attachments(KEY, words)
    patches = clone.model_options["transformer_options"].setdefault("patches", {})
    patches["attn2_patch"] = [patch for patch in earlier if not isinstance(patch, ContextAdapters)]
    clone.set_model_attn2_patch(ContextAdapters(words, block_names(model)))
    clone.remove_wrappers_with_key(internals.WrappersMP.DIFFUSION_MODEL, KEY)
    clone.add_wrapper_with_key(internals.WrappersMP.DIFFUSION_MODEL, KEY, _to_options)
    if not isinstance(clone.object_patches.get("extra_conds"), Conditions):
        clone.add_object_patch("extra_conds", Conditions(clone.get_model_object("extra_conds")))
    return clone


class Conditions:
    """Wraps the host's `extra_conds` to also pass on where the tokens act."""

    def __init__(self, original):
        self.original = original

    def __call__(self, **kwargs):
        masks = {name: internals.CONDCrossAttn(value) for name, value in kwargs.items() if name.startswith(f"{KEY} ")}
        return self.original(**kwargs) | masks


def _to_options(executor, x, timesteps, context, y, control, options, **kwargs):
    """Wrap the U-Net to move the masks of the tokens into the options that its blocks read."""
    masks = {name.removeprefix(f"{KEY} "): kwargs.pop(name) for name in [*kwargs] if name.startswith(f"{KEY} ")}
    return executor(x, timesteps, context, y, control, {**options, KEY: masks}, **kwargs)


def block_names(model) -> dict[str, tuple]:
    """Map diffusers' path of each cross-attention to the host's name of its block, such as ("input", 4, 0)."""
    names, end = {}, ".attn2.to_k.weight"
    for path, key in internals.unet_to_diffusers(model.model.model_config.unet_config).items():
        if path.endswith(end):
            parts = key.split(".")
            number = 0 if parts[0] == "middle_block" else int(parts[1])
            names[path.removesuffix(".to_k.weight")] = parts[0].split("_")[0], number, int(parts[-4])
    return names


def check(adapters: dict[str, Tensor], model, clip) -> None:
    """Raise `ValueError` unless every adapter is complete and has the shape of a layer of this MODEL or CLIP."""
    wanted = _shapes(model, clip) if adapters else {}
    for name in {key.rpartition(".")[0] for key in adapters}:
        down, up = adapters.get(f"{name}.down"), adapters.get(f"{name}.up")
        whole = down is not None and up is not None and down.ndim == up.ndim == 2 and len(down) == up.shape[1]
        if not whole or wanted.get(name) != (len(up), down.shape[1]):
            raise ValueError(
                f"The learned adapter {name} does not fit this MODEL and CLIP: use the family of models that the run "
                "was trained on."
            )


def _shapes(model, clip) -> dict[str, tuple[int, int]]:
    """Return rows and columns of every layer that can have an adapter."""
    width = model.model.model_config.unet_config["context_dim"]
    shapes = {f"{UNET}{path}": (width, width) for path in block_names(model)}
    for i, name in enumerate(models.encoder_names(clip)):
        for number, layer in enumerate(text_model(clip, name).encoder.layers):
            shapes[f"{TEXT}{i}.encoder.layers.{number}.mlp.fc2"] = tuple(layer.mlp.fc2.weight.shape)
    return shapes
