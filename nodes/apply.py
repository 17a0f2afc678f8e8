"""Apply Personalized: patches a MODEL and a CLIP with a result, in ways that every stock node honours."""

import math

from comfy_api.latest import io
from torch import Tensor

from ..trainers.runs.result import RunResult
from ..trainers.text import quoted
from .host import causal_adapters, clip_attachment, full_precision, internals, models
from .host.causal_adapters import WordAdapters
from .schema import checked
from .sockets import CATEGORY, ResultSocket, learned_outputs

FULL_PRECISION = (
    "Add the learned weights in full precision at every use instead of merging them into half-precision weights; "
    "slightly slower, and nodes that save checkpoints do not include them."
)


class Apply(io.ComfyNode):
    """Turns a RESULT into a MODEL and a CLIP, with the strengths that Load LoRA has."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        strength = {"default": 1.0, "min": -20.0, "max": 20.0, "step": 0.05}
        return io.Schema(
            node_id="PersonalizeApply",
            display_name="Apply Personalized",
            category=CATEGORY,
            description="Applies a trained result to a model and a text encoder, with adjustable strength.",
            search_aliases=["strength", "lora", "weight", "apply"],
            inputs=[
                io.Model.Input("model"),
                io.Clip.Input("clip"),
                ResultSocket.Input("result"),
                io.Float.Input(
                    "strength_unet", **strength, tooltip="Strength of what the U-Net learned, if the method trains it."
                ),
                io.Float.Input(
                    "strength_text_encoder", **strength,
                    tooltip="Strength of what the text encoder learned; the token embedding is always applied in full.",
                ),
                io.Boolean.Input("full_precision", default=False, advanced=True, optional=True, tooltip=FULL_PRECISION),
            ],
            outputs=learned_outputs(),
        )  # fmt: skip

    @classmethod
    @checked
    def execute(cls, model, clip, result, strength_unet, strength_text_encoder, full_precision=False) -> io.NodeOutput:
        return io.NodeOutput(*apply(model, clip, result, strength_unet, strength_text_encoder, full_precision))


def apply(
    model,
    clip,
    result: RunResult,
    strength_unet: float = 1.0,
    strength_text_encoder: float = 1.0,
    in_full_precision: bool = False,
):
    """Return clones of `model` and `clip` that have learned the concept.

    Raises:
        ValueError: the result does not fit this MODEL and CLIP.
    """
    encoders, unet_keys, text_keys = check(model, clip, result)
    if in_full_precision or result.rank_schedule:  # weights that depend on the timestep cannot be merged
        patched, patched_clip = model.clone(), clip.clone()
        full_precision.add(patched, result.lora, unet_keys, strength_unet, result.rank_schedule)
        full_precision.add(patched_clip.patcher, result.lora, text_keys, strength_text_encoder)
    else:
        lora, strengths = result.lora, (strength_unet, strength_text_encoder)
        patched, patched_clip = internals.load_lora_for_models(model, clip, lora, *strengths)
    earlier = clip_attachment.of(clip)
    tokens = {token: dict(zip(encoders, vectors, strict=True)) for token, vectors in result.tokens.items()}
    fixed = dict(zip(encoders, result.fixed_outputs, strict=False))
    learned = {result.placeholder_token: WordAdapters(result.adapters, strength_text_encoder, strength_unet)}
    carried = clip_attachment.ClipAttachment(
        tokens=earlier.tokens | tokens,
        fixed_outputs=earlier.fixed_outputs | fixed,
        adapters=earlier.adapters | learned,
    )
    return causal_adapters.attach_unet(patched, learned), clip_attachment.attach(patched_clip, carried)


def check(model, clip, result: RunResult) -> tuple[tuple[str, ...], dict[str, str], dict[str, str]]:
    """Return the text encoders' names, and two maps from layer names in a file to the host's U-Net and encoder weights.

    Raises:
        ValueError: the result is incomplete, or does not fit this MODEL and CLIP.
    """
    encoders = models.family_of(model, clip).text_encoders
    unet_keys = internals.model_lora_keys_unet(model.model, {})
    text_keys = internals.model_lora_keys_clip(clip.cond_stage_model, {})
    shapes = {**_shapes(model.model), **_shapes(clip.cond_stage_model)}
    check_layers(result.lora, {**unet_keys, **text_keys}, shapes)
    check_carried(result, clip, encoders)
    causal_adapters.check(result.adapters, model, clip)
    return encoders, unet_keys, text_keys


def fits(model, clip, result: RunResult) -> bool:
    """Return whether `check` raises nothing."""
    try:
        return bool(check(model, clip, result))
    except ValueError:
        return False


def _shapes(module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(parameter.shape) for name, parameter in module.named_parameters()}


def check_layers(lora: dict[str, Tensor], keys: dict[str, str], shapes: dict[str, tuple[int, ...]]) -> None:
    """Raise `ValueError` unless every layer belongs to a weight and has its shape; the host would only log it."""
    layers: dict[str, dict[str, Tensor]] = {}
    for key, value in lora.items():
        name, _, part = key.partition(".")
        layers.setdefault(name, {})[part] = value
    unknown = sorted(layers.keys() - keys.keys())
    if unknown:
        raise ValueError(
            f"{len(unknown)} of {len(layers)} learned layers are not in this MODEL and CLIP (such as "
            f"{quoted(unknown[0])}): use the family of models that the run was trained on."
        )
    if len({keys[name] for name in layers}) < len(layers):
        raise ValueError("Two learned layers name the same weight, in two spellings: save or download the file again.")
    for name, parts in layers.items():
        if not _is_whole(parts):
            raise ValueError(
                f"The learned layer {quoted(name)} is incomplete: queue the run's training again, or delete the run."
            )
        weight = shapes[keys[name]]
        if not _fits(parts, weight, shapes.get(full_precision.bias_of(keys[name]), ())):
            raise ValueError(
                f"The learned layer {quoted(name)} does not have the shape of its weight in this MODEL or CLIP, "
                f"{' x '.join(map(str, weight))}: use the family of models that the run was trained on."
            )


def _is_whole(parts: dict[str, Tensor]) -> bool:
    """Return whether these are a LoRA, a full weight difference, a bias difference, or one of the first two with it."""
    kind = parts.keys() - {"diff_b"}
    if kind == {"lora_up.weight", "lora_down.weight", "alpha"}:
        up, down, alpha = (parts[part] for part in ("lora_up.weight", "lora_down.weight", "alpha"))
        return alpha.numel() == 1 and up.ndim > 1 and down.ndim > 1 and up.numel() > 0 and down.numel() > 0
    return bool(parts) and kind <= {"diff"}


def _fits(parts: dict[str, Tensor], weight: tuple[int, ...], bias: tuple[int, ...]) -> bool:
    shapes = {part: tuple(value.shape) for part, value in parts.items()}
    if shapes.get("diff", weight) != weight or shapes.get("diff_b", bias) != bias:
        return False
    if "diff" in parts or "alpha" not in parts:
        return True
    up, down = parts["lora_up.weight"], parts["lora_down.weight"]
    return (len(up), up[0].numel(), down[0].numel()) == (weight[0], len(down), math.prod(weight[1:]))


def check_carried(result: RunResult, clip, encoders: tuple[str, ...]) -> None:
    """Raise `ValueError` unless the learned embeddings have the shapes of the text encoders."""
    shapes = [tuple(outputs.shape) for outputs in result.fixed_outputs] or [None] * len(encoders)
    whole = all(len(vectors) == len(encoders) for vectors in result.tokens.values()) and len(shapes) == len(encoders)
    for i, name in enumerate(encoders):
        encoder = getattr(clip.cond_stage_model, name).transformer
        width = encoder.get_input_embeddings().weight.shape[1]
        words = {tuple(vectors[i].shape[1:]) for vectors in result.tokens.values()} if whole else set()
        if not whole or words - {(width,)} or shapes[i] not in (None, (encoder.num_layers + 1, 77, width)):
            raise ValueError(
                f"The learned token embeddings do not fit this CLIP, whose width is {width}: use the family of models "
                "that the run was trained on."
            )
