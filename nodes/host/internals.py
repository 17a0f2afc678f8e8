"""Looks up, by name and when used, what the pack takes from inside the host beyond its public interface.

If a host has moved one of these, one sentence says so and all other nodes still work; an AttributeError in the middle
of a training would not tell. Functions and classes are attributes of this module: `internals.calculate_weight`.
"""

import importlib
from operator import attrgetter

# What later hosts fold into the call of a linear layer: residual + residual_scale * layer(input_act(x)).
FOLDED = {"input_act", "act_weight", "act_eps", "residual", "residual_scale"}

TAKEN = {
    "CONDCrossAttn": "comfy.conds",
    "CONST": "comfy.model_sampling",
    "EPS": "comfy.model_sampling",
    "KSAMPLER": "comfy.samplers",
    "ModelSamplingDiscrete": "comfy.model_sampling",
    "KSampler": "comfy.samplers",
    "ProgressBar": "comfy.utils",
    "SD15": "comfy.supported_models",
    "SD20": "comfy.supported_models",
    "SDXL": "comfy.supported_models",
    "V_PREDICTION": "comfy.model_sampling",
    "WrappersMP": "comfy.patcher_extension",
    "args": "comfy.cli_args",
    "calculate_weight": "comfy.lora",
    "convert_cond": "comfy.sampler_helpers",
    "encode_model_conds": "comfy.samplers",
    "free_memory": "comfy.model_management",
    "get_attr": "comfy.utils",
    "get_executing_context": "comfy_execution.utils",
    "get_free_memory": "comfy.model_management",
    "get_key_weight": "comfy.model_patcher",
    "get_torch_device": "comfy.model_management",
    "load_lora_for_models": "comfy.sd",
    "load_models_gpu": "comfy.model_management",
    "model_lora_keys_clip": "comfy.lora",
    "model_lora_keys_unet": "comfy.lora",
    "prepare_noise": "comfy.sample",
    "sample": "comfy.sample",
    "sample_custom": "comfy.sample",
    "should_use_bf16": "comfy.model_management",
    "should_use_fp16": "comfy.model_management",
    "soft_empty_cache": "comfy.model_management",
    "throw_exception_if_processing_interrupted": "comfy.model_management",
    "unet_to_diffusers": "comfy.utils",
    "unload_all_models": "comfy.model_management",
}


class HostChanged(RuntimeError):
    """Raised if this ComfyUI lacks something that the pack uses."""


def __getattr__(name: str):
    if name not in TAKEN:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        return getattr(importlib.import_module(TAKEN[name]), name)
    except (ImportError, AttributeError) as error:
        raise changed(f"{TAKEN[name]}.{name}") from error


def part(thing, path: str):
    """Return what is at a dotted path inside one of the host's objects.

    Raises:
        HostChanged: the path does not exist.
    """
    try:
        return attrgetter(path)(thing)
    except AttributeError as error:
        raise changed(f"{type(thing).__name__}.{path}") from error


def node_class(kind: str):
    """Return the class of a node by its name in prompts; `None` where there is none."""
    return part(importlib.import_module("nodes"), "NODE_CLASS_MAPPINGS").get(kind)


def changed(what: str) -> HostChanged:
    """Return the error that says what this ComfyUI lacks."""
    return HostChanged(
        f"This ComfyUI has no {what}, which Personalize needs: update Personalize, or use the newest ComfyUI in its "
        "README's table."
    )


def linear_input(x, folded: dict):
    """Return the input and the output scale of a linear layer that the host calls with the operations `folded` into it.

    Raises:
        HostChanged: the host folds in an operation that the pack does not know.
    """
    given = {name: value for name, value in folded.items() if value is not None}
    activation = given.get("input_act")
    weights = {name: given[name] for name in ("act_weight", "act_eps") if name in given}
    if given.keys() - FOLDED:
        raise changed(f"linear layer without {sorted(given.keys() - FOLDED)[0]}")
    if activation is not None:
        x = _activated(x, activation, weights)
    return x, given.get("residual_scale", 1.0)


def _activated(x, activation: str, weights: dict):
    """Apply the host's own activation; the host has a separate function for those with weights, which are norms."""
    import comfy.ops

    try:
        if weights:
            return comfy.ops._eager_input_act(x, activation, **weights)
        return comfy.ops.INPUT_ACT_EAGER[activation](x)
    except (AttributeError, KeyError, TypeError) as error:
        raise changed(f"activation {activation} in its linear layers") from error
