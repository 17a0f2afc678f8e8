"""LoRAs and embeddings of any program in this pack's own names, and its complete files. Tensors in, tensors out.

Every key of a file is used, or the file is refused in one sentence: nothing is dropped in silence.
"""

import json
import math
import re

import torch
from torch import Tensor

from ..models.tokenizer import ROOM
from ..text import quoted
from . import kohya

KOHYA = (kohya.UNET_PREFIX, "lora_te_", "lora_te1_", "lora_te2_")
PARTS = {"lora_down.weight", "lora_up.weight", "alpha", "diff", "diff_b"}
# diffusers' components and kohya's prefixes.
COMPONENTS = {"unet": kohya.UNET_PREFIX, "text_encoder": "lora_te1_", "text_encoder_2": "lora_te2_"}
UNET_PARTS = ("down_blocks.", "mid_block.", "up_blocks.", "conv_in.", "conv_out.", "time_embedding.", "add_embedding.")
OTHERS = {
    "dora_scale": "a DoRA",
    "lora_magnitude_vector": "a DoRA",
    ".hada_": "a LoHa",
    ".lokr_": "a LoKr",
    ".lora_mid.": "a LoCon in Tucker's form",
    ".oft_": "an OFT",
}
BUNDLED = "bundle_emb."  # before the embeddings that OneTrainer puts into a LoRA
PEFT = "base_model.model."  # before the names of PEFT's `save_pretrained`
STOCK = "use ComfyUI's own Load LoRA for this one"
NO_SCALE = f"This LoRA's description of its scale cannot be read: {STOCK}."
NOT_WHOLE = "The layer {} of this LoRA is incomplete: download or save the file again."
DAMAGED = "This file of Save Personalized is incomplete: save the result again."


def lora(state: dict[str, Tensor], header: dict[str, str], adapter_config: str = "") -> dict[str, Tensor]:
    """Convert a LoRA to kohya's names with an alpha for every layer, from kohya's, diffusers' or PEFT's names.

    Args:
        adapter_config: the text of adapter_config.json, which PEFT's `save_pretrained` writes next to the file.

    Raises:
        ValueError: the file holds something else, or more.
    """
    for mark, kind in OTHERS.items():
        if any(mark in key for key in state):
            raise ValueError(f"This LoRA is {kind}, which cannot be read here: {STOCK}.")
    for key in (key for key in state if not key.endswith("alpha") and not state[key].is_floating_point()):
        raise ValueError(f"This LoRA has whole numbers in {quoted(key)}, as quantized files do: {STOCK}.")
    if any(key.startswith(KOHYA) for key in state):
        return _whole(dict(state))
    # PEFT's module names hold the adapter's own name; its files leave it out.
    state = {re.sub(r"\.(lora_[AB])\.default\.", r".\1.", key): value for key, value in state.items()}
    if any(key.startswith(PEFT) for key in state):
        state, header = _from_peft(state, adapter_config)
    return _whole(_from_diffusers(state, header))


def _from_peft(state: dict[str, Tensor], adapter_config: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return a file of `save_pretrained` in diffusers' names, and its settings in diffusers' header."""
    if not adapter_config:
        raise ValueError(
            "This LoRA of PEFT has its scale in adapter_config.json: copy that file of its folder next to it."
        )
    layers = {key.removeprefix(PEFT): value for key, value in state.items()}
    component = "unet" if any(key.startswith(UNET_PARTS) for key in layers) else "text_encoder"
    config = _config({"lora_adapter_metadata": adapter_config})
    ranks = {len(value) for key, value in layers.items() if ".lora_A." in key}
    if not config.get("rank_pattern") and config.get("r") not in ranks:
        raise ValueError("The adapter_config.json next to this LoRA is another one's: copy its own there.")
    header = json.dumps({f"{component}.{name}": value for name, value in config.items()})
    return {f"{component}.{key}": value for key, value in layers.items()}, {"lora_adapter_metadata": header}


def _whole(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Add missing alphas, each its layer's rank, for a scale of 1."""
    _refuse_unknown([key for key in state if not _is_kohyas(key)], state)
    for name in {key.partition(".")[0] for key in state}:
        has = {part for part in PARTS if f"{name}.{part}" in state}
        low_rank = {"lora_down.weight", "lora_up.weight"} <= has
        if low_rank:
            down, up = (_matrix(state, f"{name}.lora_{part}.weight") for part in ("down", "up"))
            if up.shape[1] != len(down):
                raise ValueError(NOT_WHOLE.format(quoted(name)))
            state.setdefault(f"{name}.alpha", torch.tensor(float(len(down))))
        if not (low_rank or has & {"diff", "diff_b"}) or "diff" in has and has - {"diff", "diff_b"}:
            raise ValueError(NOT_WHOLE.format(quoted(name)))
    return state


def _is_kohyas(key: str) -> bool:
    return key.startswith(KOHYA) and key.partition(".")[2] in PARTS


def _matrix(state: dict[str, Tensor], key: str) -> Tensor:
    if key not in state or state[key].ndim < 2 or not state[key].numel():
        raise ValueError(NOT_WHOLE.format(quoted(key)))
    return state[key]


def _refuse_unknown(unknown: list[str], state: dict[str, Tensor]) -> None:
    if unknown or not state:
        example = f" (such as {quoted(min(unknown))})" if unknown else ""
        raise ValueError(f"{len(unknown)} of this LoRA's {len(state)} entries are unknown here{example}: {STOCK}.")


def _from_diffusers(state: dict[str, Tensor], header: dict[str, str]) -> dict[str, Tensor]:
    # diffusers' oldest files are of the U-Net alone and do not say so.
    state = {f"unet.{key}" if key.startswith(UNET_PARTS) else key: value for key, value in state.items()}
    _refuse_unknown([key for key in state if key.partition(".")[0] not in COMPONENTS], state)
    config = _config(header)
    found: dict[str, Tensor] = {}
    for component, prefix in COMPONENTS.items():
        part = {key.partition(".")[2]: value for key, value in state.items() if key.partition(".")[0] == component}
        mine = {key.partition(".")[2]: value for key, value in config.items() if key.partition(".")[0] == component}
        named = _in_pefts_names(part, component)
        if len(named) < len(part):
            raise ValueError(f"This LoRA contains a layer twice, in two spellings: {STOCK}.")
        _refuse_unknown(_unknown(named), state)
        found |= _component(prefix, named, mine) if part else {}
    return found


def _in_pefts_names(part: dict[str, Tensor], component: str) -> dict[str, Tensor]:
    """Return `<layer>.lora_A.weight` and `.lora_B.weight`, whichever of its three spellings diffusers used."""
    from diffusers.utils import state_dict_utils as spellings

    if component == "unet":
        return spellings.convert_unet_state_dict_to_peft(part)
    kind, old = spellings.StateDictType, any(f".to_{x}_lora." in key for key in part for x in ("q", "k", "v", "out"))
    part = spellings.convert_state_dict_to_peft(part, kind.DIFFUSERS_OLD if old else kind.DIFFUSERS)
    # transformers 5 has no text_model around the layers.
    return {f"text_model.{key}" if key.startswith("encoder.") else key: value for key, value in part.items()}


def _layers(part: dict[str, Tensor]) -> list[str]:
    return sorted(key.removesuffix(".lora_A.weight") for key in part if key.endswith(".lora_A.weight"))


def _unknown(part: dict[str, Tensor]) -> list[str]:
    known = {f"{name}.{end}" for name in _layers(part) for end in ("lora_A.weight", "lora_B.weight", "alpha")}
    return [key for key in part if key not in known or key.endswith("alpha") and part[key].numel() > 1]


def _component(prefix: str, part: dict[str, Tensor], config: dict) -> dict[str, Tensor]:
    """Convert one component's layers to kohya's names."""
    _check_config(config)
    found: dict[str, Tensor] = {}
    for name in _layers(part):
        down, up = (_matrix(part, f"{name}.lora_{x}.weight") for x in "AB")
        alpha = part.get(f"{name}.alpha")
        found |= kohya.kohya(prefix, name, down, up, _alpha(name, len(down), config) if alpha is None else float(alpha))
    return found


def _config(header: dict[str, str]) -> dict:
    """Read PEFT's settings as diffusers writes them into the header, `unet.lora_alpha` and so on."""
    try:
        config = json.loads(header.get("lora_adapter_metadata", "{}"))
    except (ValueError, RecursionError):
        config = None
    if not isinstance(config, dict):
        raise ValueError(NO_SCALE)
    return config


def _check_config(config: dict) -> None:
    """Return PEFT's value of a layer; regular expressions, which PEFT allows as patterns, are never run from a file."""
    patterns = config.get("alpha_pattern") or {}
    if config.get("use_dora"):
        raise ValueError(f"This LoRA is a DoRA, which cannot be read here: {STOCK}.")
    plain = isinstance(patterns, dict) and all(re.fullmatch(r"[\w.]+", pattern) for pattern in patterns)
    numbers = (*patterns.values(), config.get("lora_alpha") or 0) if plain else ()
    if not plain or not all(isinstance(number, (int, float)) for number in numbers):
        raise ValueError(NO_SCALE)


def _matches(pattern: str, name: str) -> bool:
    return name == pattern or name.endswith(f".{pattern}")


def _alpha(name: str, rank: int, config: dict) -> float:
    """Return PEFT's alpha of a layer; without one its rank, for a scale of 1."""
    patterns = config.get("alpha_pattern") or {}
    alpha = next((value for pattern, value in patterns.items() if _matches(pattern, name)), config.get("lora_alpha"))
    alpha = rank if alpha is None else float(alpha)
    return alpha * math.sqrt(rank) if config.get("use_rslora") else alpha


def unbundled(state: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, dict[str, Tensor]]]:
    """Split a LoRA with embeddings inside into the LoRA and the embeddings, each by the name that prompts call it.

    OneTrainer names them as users like; here all are in angle brackets, so that none is a word of the vocabulary.
    """
    embeddings: dict[str, dict[str, Tensor]] = {}
    for key in (key for key in state if key.startswith(BUNDLED)):
        name, dot, part = key.removeprefix(BUNDLED).rpartition(".string_to_param.")
        if not dot:
            name, _, part = key.removeprefix(BUNDLED).rpartition(".")
        word = re.sub(r"[^\w*-]+", "_", name.strip("<> "))
        embeddings.setdefault(f"<{word}>", {})[part] = state[key]
    return {key: value for key, value in state.items() if not key.startswith(BUNDLED)}, embeddings


def embedding(state: dict[str, Tensor], widths: dict[str, int]) -> tuple[Tensor, ...]:
    """Return learned vectors `[n, d]` per text encoder, from A1111's, diffusers' or the host's names.

    Args:
        widths: the host's names of the text encoders and the width of their embeddings.

    Raises:
        ValueError: the file contains something else, or is made for another family.
    """
    # A1111's ids within its own vocabulary mean nothing elsewhere.
    state = {key: value for key, value in state.items() if not key.startswith("string_to_token")}
    if len(state) == len(widths) == 1:
        state = dict(zip(widths, state.values(), strict=True))
    if state.keys() != widths.keys():
        found = ", ".join(map(quoted, sorted(state)[:4])) or "nothing"
        raise ValueError(
            f"This embedding contains {found} but this CLIP needs {' and '.join(widths)}: use one made for "
            "this family of models."
        )
    return tuple(_vectors(state[name], width) for name, width in widths.items())


def _vectors(tensor: Tensor, width: int) -> Tensor:
    vectors = tensor[None] if tensor.ndim == 1 else tensor
    if vectors.ndim != 2 or not vectors.is_floating_point() or not len(vectors) or vectors.shape[1] != width:
        shape = " x ".join(map(str, tensor.shape)) or "a single number"
        raise ValueError(
            f"This embedding is {shape} but this CLIP's embeddings are {width} wide: use one made for this family "
            "of models."
        )
    if len(vectors) > ROOM:
        raise ValueError(f"This embedding has {len(vectors)} vectors but a prompt {ROOM} tokens: use a smaller one.")
    return vectors.float()
