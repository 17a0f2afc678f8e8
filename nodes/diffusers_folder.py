"""A model's folder of diffusers as a RESULT: what its U-Net and its new tokens add to a MODEL and a CLIP.

    FOLDER/unet/diffusion_pytorch_model.safetensors
    FOLDER/text_encoder/model.safetensors, FOLDER/tokenizer/added_tokens.json      SDXL: and text_encoder_2, tokenizer_2

So the authors of AttnDreamBooth publish theirs: a pipeline whose U-Net trained, and a row for each vector of V.
"""

import json
import re
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor

from ..trainers import files
from ..trainers.data.concept import check_word
from ..trainers.formats import kohya
from ..trainers.models.tokenizer import END
from ..trainers.runs.result import RunResult, from_other_programs
from ..trainers.text import quoted, reason
from .host import full_precision, internals, weights

UNET = Path("unet") / "diffusion_pytorch_model.safetensors"
ENCODERS = (("text_encoder", "tokenizer"), ("text_encoder_2", "tokenizer_2"))
TABLE = "text_model.embeddings.token_embedding.weight"
ROUNDED = {"rtol": 1e-2, "atol": 1e-3}  # one of the two may be in half precision
AGAIN = "download or save the folder again"


def read(folder: Path, model, clip, encoders: tuple[str, ...]) -> RunResult:
    """Return what a folder adds to MODEL and CLIP: differences of weights, and new tokens.

    Args:
        encoders: the host's names of the text encoders.

    Raises:
        ValueError: a file cannot be read, is of another family, or a text encoder is not the CLIP's.
    """
    lora = _differences(_tensors(folder / UNET), model)
    tables = [
        _new_rows(folder / part, folder / tokenizer, clip, name)
        for (part, tokenizer), name in zip(ENCODERS, encoders, strict=False)
    ]
    if any(table.keys() != tables[0].keys() for table in tables):
        raise ValueError(f"The two tokenizers of {quoted(folder.name)} have different new tokens: {AGAIN}.")
    tokens = {token: tuple(table[token] for table in tables) for token in tables[0]}
    if not lora and not tokens:
        raise ValueError(f"The folder {quoted(folder.name)} is this MODEL itself: choose one that was trained from it.")
    return from_other_programs(folder.name, lora, {}, tokens)


def _tensors(file: Path) -> dict[str, Tensor]:
    try:
        return files.tensors(file)[0]
    except (OSError, SafetensorError) as error:
        name = f"{file.parent.name}/{file.name}"
        raise ValueError(f"The file {quoted(name)} cannot be read ({reason(error)}): {AGAIN}.") from None


def _differences(state: dict[str, Tensor], model) -> dict[str, Tensor]:
    """Return the U-Net's weights minus MODEL's as they act, where they differ, in kohya's names and half precision."""
    layers, base = internals.model_lora_keys_unet(model.model, {}), weights.effective_state_dict(model, "")
    found = {}
    for name, value in state.items():
        if name.rpartition(".")[2] not in kohya.DIFFERENCES:
            raise ValueError(f"The U-Net of this folder has {quoted(name)}, which is no weight of one: {AGAIN}.")
        key = kohya.difference_key(name)
        layer, _, part = key.partition(".")
        target = layers.get(layer, "")
        own = base.get(full_precision.bias_of(target) if part == "diff_b" else target)
        if own is None or own.shape != value.shape:
            raise ValueError(
                f"The U-Net of this folder has {quoted(name)}, {' x '.join(map(str, value.shape))}, which this MODEL "
                "does not have: use the family of models that it was trained from."
            )
        if not torch.equal(own.to(value.dtype), value):
            found[key] = (value.float() - own.float()).half()
    return found


def _new_rows(encoder: Path, tokenizer: Path, clip, name: str) -> dict[str, Tensor]:
    """Return the vectors `[n, d]` of a text encoder's new tokens by name, once its weights are seen to be CLIP's."""
    state = _tensors(encoder / "model.safetensors")
    # transformers 5 has no text_model around the layers.
    state = {key if key.startswith("text_") else f"text_model.{key}": value for key, value in state.items()}
    base = weights.effective_state_dict(clip.patcher, f"{name}.transformer.")
    if TABLE not in state or state[TABLE].shape[1:] != base[TABLE].shape[1:]:
        raise ValueError(f"The text encoder {quoted(encoder.name)} is not that of this CLIP: use its own family.")
    rows, vocabulary = state[TABLE].float(), len(base[TABLE])
    state[TABLE] = state[TABLE][:vocabulary]
    for key, value in base.items():
        own = state.get(key) if key.startswith("text_model.") else None  # the host leaves projections uninitialized
        if own is not None and not (own.shape == value.shape and torch.allclose(own.float(), value, **ROUNDED)):
            raise ValueError(
                f"The text encoder {quoted(encoder.name)} differs from this CLIP's, such as in {quoted(key)}: load the "
                "checkpoint that the folder was trained from; one that was trained itself cannot be read here."
            )
    ids: dict[str, list[int]] = {}
    added = _added(tokenizer)
    for token in sorted(added, key=added.__getitem__):
        whole = re.fullmatch(r"(.+)_\d+", token)  # diffusers' names of a token's further vectors
        ids.setdefault(whole[1] if whole and whole[1] in added else token, []).append(added[token])
    for token, own in ids.items():
        check_word(token)
        if not vocabulary <= min(own) <= max(own) < len(rows):
            raise ValueError(f"The token {token} has no row in {quoted(encoder.name)}: {AGAIN}.")
    return {token: rows[own] for token, own in ids.items()}


def _added(tokenizer: Path) -> dict[str, int]:
    """Return the tokens behind CLIP's own vocabulary and their ids, of either file that tokenizers write."""
    try:
        if (file := tokenizer / "added_tokens.json").is_file():
            added = json.loads(file.read_text(encoding="utf-8"))
        elif (file := tokenizer / "tokenizer.json").is_file():
            entries = json.loads(file.read_text(encoding="utf-8"))["added_tokens"]
            added = {entry["content"]: entry["id"] for entry in entries}
        else:
            return {}
        return {str(token): int(number) for token, number in added.items() if int(number) > END}
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        name = f"{tokenizer.name}/{file.name}"
        raise ValueError(f"The file {quoted(name)} cannot be read: {AGAIN}.") from None
