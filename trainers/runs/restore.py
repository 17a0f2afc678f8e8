"""Restoring what a run learned into models like those it started from: the inverse of kohya.py.

The models then compute what they computed at the end of the training, bit for bit; weights that trained themselves are
restored from a file's difference, in half precision.
"""

import torch
from torch import nn

from ..formats import kohya
from ..models.diffusion import Models
from ..models.flow import is_linear
from ..models.timestep_lora import restore_timestep_lora
from ..training import causal_adapters, trainables
from .result import RunResult

OTHER_MODEL = "The result of this run does not fit this model: give the checkpoint that the run started from."


def put(result: RunResult, models: Models) -> None:
    """Restore tokens, fixed outputs, weights, LoRA and adapters into fresh models, on their device in their precision.

    Raises:
        ValueError: the result does not fit these models.
    """
    try:
        _tokens(result, models)
        used = _differences(result.lora, models) | _lora(result, models)
        _adapters(result, models)
    except (LookupError, RuntimeError) as error:  # too few parts, or other shapes
        raise ValueError(OTHER_MODEL) from error
    if used != {key.partition(".")[0] for key in result.lora}:
        raise ValueError(OTHER_MODEL)


def _tokens(result: RunResult, models: Models) -> None:
    for i, encoder in enumerate(models.text_encoders):
        encoder.known_tokens = {token: vectors[i] for token, vectors in result.tokens.items()}
        trainables.add_tokens(encoder, [(token, "id:0") for token in result.tokens])
    for encoder, outputs in zip(models.text_encoders, result.fixed_outputs):  # there may be none
        encoder.fixed_outputs = outputs.to(encoder.device)


def _differences(lora: dict[str, torch.Tensor], models: Models) -> set[str]:
    """Restore differences of the U-Net's weights; return the layers, in a file's names."""
    names = [name for name, _ in models.unet.named_parameters() if name.rpartition(".")[2] in kohya.DIFFERENCES]
    changed = [name for name in names if kohya.difference_key(name) in lora]
    for name in changed:
        (parameter,) = trainables.select(models, name)
        parameter.data += lora[kohya.difference_key(name)].to(parameter)
    return {kohya.difference_key(name).partition(".")[0] for name in changed}


def _lora(result: RunResult, models: Models) -> set[str]:
    """Restore LoRA of the U-Net and the text encoders; return the layers, in a file's names."""
    encoders = zip(kohya.TEXT_ENCODER_PREFIXES[len(models.text_encoders)], models.text_encoders, strict=True)
    used = {
        name
        for prefix, encoder in encoders
        for name in _lora_of(result.lora, f"{prefix}text_model_", encoder.text_model)
    }
    if not result.rank_schedule:
        return used | _lora_of(result.lora, kohya.UNET_PREFIX, models.unet)
    named = _named(result.lora, kohya.UNET_PREFIX, models.unet)
    ends = ("lora_down.weight", "lora_up.weight")
    factors = {path: tuple(result.lora[f"{name}.{end}"] for end in ends) for path, name in named.items()}
    restore_timestep_lora(models, result.rank_schedule, factors)
    return used | {*named.values()}


def _named(lora: dict[str, torch.Tensor], prefix: str, module: nn.Module) -> dict[str, str]:
    """Return the paths of linear layers that have a LoRA, with their names in a file."""
    linear = [path for path, layer in module.named_modules() if is_linear(layer)]
    return {path: name for path in linear if f"{(name := prefix + path.replace('.', '_'))}.lora_up.weight" in lora}


def _lora_of(lora: dict[str, torch.Tensor], prefix: str, module: nn.Module) -> set[str]:
    named = _named(lora, prefix, module)
    # A LoRA that adds nothing is not restored; kohya.py writes one for diffusers.
    layers = {path: name for path, name in named.items() if lora[f"{name}.lora_up.weight"].any()}
    if layers:
        first = next(iter(layers.values()))
        rank, alpha = len(lora[f"{first}.lora_down.weight"]), lora[f"{first}.alpha"]
        written = float(str(alpha.numpy()))  # 1.3, where float32 has 1.29999995
        trainables.add_lora(module, [*layers], rank, written, torch.Generator())
    for path, name in layers.items():
        for part, end in (("lora_A", "lora_down"), ("lora_B", "lora_up")):
            module.get_parameter(f"{path}.{part}.default.weight").data.copy_(lora[f"{name}.{end}.weight"])
    return {*named.values()}


def _adapters(result: RunResult, models: Models) -> None:
    if not (names := result.adapters):
        return
    models.known_adapters[result.placeholder_token] = names
    encoders = sorted({int(name.split(".")[1]) for name in names if name.startswith("text_encoders.")})
    rank = len(next(value for name, value in names.items() if name.endswith(".down")))
    causal_adapters.add_adapters(
        models, result.placeholder_token, slice(encoders[0], encoders[-1] + 1), rank, torch.Generator(),
        cross_attention=any(name.startswith("unet.") for name in names),
    )  # fmt: skip
