"""Names of tensors in files, under which other programs load what was trained. The only file with key names."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from ..models.diffusion import Models

UNET_PREFIX = "lora_unet_"
# Stock loaders' names of each text encoder's LoRA: one encoder is "te", two are "te1" and "te2".
TEXT_ENCODER_PREFIXES = {0: (), 1: ("lora_te_",), 2: ("lora_te1_", "lora_te2_")}
DIFFERENCES = {"weight": "diff", "bias": "diff_b"}  # of a weight that trained itself
LORA = "lora."  # before a LoRA's names in a complete file
ENCODERS = ("clip_l", "clip_g")  # in an embedding for SDXL


def lora(models: Models) -> dict[str, Tensor]:
    """Return LoRA of U-Net and text encoders in kohya's names, with alpha: ComfyUI and diffusers load it.

    Weights that trained themselves are saved as differences, which ComfyUI loads like a LoRA.

    Without the `.alpha` entry a loader would take the scale alpha / rank to be 1.
    """
    state: dict[str, Tensor] = {}
    for layer in _lora_layers(models.unet):
        state |= kohya(UNET_PREFIX, *layer)
    state |= _differences(models)
    for prefix, encoder in zip(TEXT_ENCODER_PREFIXES[len(models.text_encoders)], models.text_encoders, strict=True):
        layers = [*_lora_layers(encoder.text_model)]
        for layer in layers:
            state |= kohya(f"{prefix}text_model_", *layer)
        for _, down, up, alpha in layers[-1:]:
            # diffusers recognizes kohya's names by an out_proj among them; this one adds nothing.
            state |= kohya(f"{prefix}text_model_", "encoder.layers.0.self_attn.out_proj", down * 0, up * 0, alpha)
    return state


def _differences(models: Models) -> dict[str, Tensor]:
    """Return trained minus initial weights of the U-Net, in half precision."""
    state, now = {}, dict(models.unet.named_parameters())
    for name, base in models.base_weights.items():
        state[difference_key(name)] = (_detached(now[name]) - base.float()).half()
    return state


def difference_key(name: str) -> str:
    """Return the name in a file of the difference of one of the U-Net's weights."""
    path, _, kind = name.rpartition(".")
    return f"{UNET_PREFIX}{path.replace('.', '_')}.{DIFFERENCES[kind]}"


def _lora_layers(module: nn.Module) -> Iterator[tuple[str, Tensor, Tensor, float]]:
    """Yield path, A `[rank, in]`, B `[out, rank]` and alpha of every LoRA in `module`."""
    for path, layer in module.named_modules():
        if hasattr(layer, "lora_A"):
            down, up = (_detached(part["default"].weight) for part in (layer.lora_A, layer.lora_B))
            yield path, down, up, layer.lora_alpha["default"]
        elif hasattr(layer, "factors"):  # a T-LoRA at full rank
            down, up = map(_detached, layer.factors())
            yield path, down, up, len(down)


def kohya(prefix: str, path: str, down: Tensor, up: Tensor, alpha: float) -> dict[str, Tensor]:
    """Return one layer in kohya's names."""
    name = prefix + path.replace(".", "_")
    return {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up, f"{name}.alpha": torch.tensor(float(alpha))}


def token_vectors(models: Models) -> dict[str, tuple[Tensor, ...]]:
    """Return, by placeholder token, the learned vectors `[n, d]`, one tensor per text encoder."""
    tables = []
    for encoder in models.text_encoders:
        if not encoder.tokenizer.placeholders:
            return {}
        rows, first = _detached(encoder.embedding.get_parameter("rows")), encoder.tokenizer.vocab_size
        placeholders = encoder.tokenizer.placeholders.items()
        tables.append({token: rows[ids[0] - first : ids[-1] + 1 - first].clone() for token, ids in placeholders})
    return {token: tuple(table[token] for table in tables) for token in (tables[0] if tables else ())}


def carried(
    tokens: dict[str, tuple[Tensor, ...]],
    fixed_outputs: tuple[Tensor, ...],
    adapters: dict[str, Tensor],
    ranks: tuple[int, ...],
) -> dict[str, Tensor]:
    """Flatten what MODEL and CLIP carry besides a LoRA.

    `tokens.<encoder>.<placeholder>`, `fixed.<encoder>`, `adapters.<name>.down` or `.up`, and a T-LoRA's `ranks`.
    """
    state = {f"tokens.{i}.{token}": v for token, vectors in tokens.items() for i, v in enumerate(vectors)}
    state |= {f"fixed.{i}": outputs.contiguous() for i, outputs in enumerate(fixed_outputs)}
    state |= {"ranks": torch.tensor(ranks)} if ranks else {}
    return state | {f"adapters.{name}": tensor.contiguous() for name, tensor in adapters.items()}


def read_carried(
    state: dict[str, Tensor],
) -> tuple[dict[str, tuple[Tensor, ...]], tuple[Tensor, ...], dict[str, Tensor], tuple[int, ...]]:
    """Invert `carried`."""
    tokens: dict[str, tuple[Tensor, ...]] = {}
    for key in sorted(key for key in state if key.startswith("tokens.")):
        token = key.split(".", 2)[2]
        tokens[token] = (*tokens.get(token, ()), state[key])
    fixed = tuple(state[key] for key in sorted(state) if key.startswith("fixed."))
    adapters = {key.removeprefix("adapters."): v for key, v in state.items() if key.startswith("adapters.")}
    return tokens, fixed, adapters, tuple(state["ranks"].tolist()) if "ranks" in state else ()


def complete(lora: dict[str, Tensor], learned: dict[str, Tensor]) -> dict[str, Tensor]:
    """Join a LoRA and what `carried` returns for one file."""
    return {f"{LORA}{name}": value for name, value in lora.items()} | learned


def read_complete(state: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Invert `complete`."""
    lora = {name.removeprefix(LORA): value for name, value in state.items() if name.startswith(LORA)}
    return lora, {name: value for name, value in state.items() if not name.startswith(LORA)}


def embedding(token: str, vectors: tuple[Tensor, ...]) -> dict[str, Tensor]:
    """Return the tensors of an embedding file.

    One tensor under the placeholder's name: the host takes the first tensor, diffusers also reads the name. Of a model
    with two text encoders, one under the host's and diffusers' name of each.
    """
    return dict(zip(ENCODERS if len(vectors) == 2 else (token,), vectors, strict=True))


def _detached(tensor: Tensor) -> Tensor:
    return tensor.detach().float().cpu().contiguous()
