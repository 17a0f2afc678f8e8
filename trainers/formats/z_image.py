"""Z-Image's LoRA in names that both diffusers and the stock loader read.

The host keeps an attention's queries, keys and values in one matrix, diffusers in three: a LoRA of the one is three of
the others, with the same A and a third of B's rows each.
"""

import re

from torch import Tensor

from . import kohya

LAYER = re.compile(
    rf"{kohya.UNET_PREFIX}(layers|noise_refiner|context_refiner)_(\d+)_(attention|feed_forward|adaLN_modulation)_(\w+)"
)
PARTS = {"out": "to_out.0"}


def with_diffusers_names(lora: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return Z-Image's LoRA under diffusers' names; any other unchanged."""
    if not lora or not all(LAYER.fullmatch(key.partition(".")[0]) for key in lora) or not _of_one_width(lora):
        return lora
    renamed: dict[str, Tensor] = {}
    for name in dict.fromkeys(key.partition(".")[0] for key in lora):
        down, up, alpha = (lora[f"{name}.{part}"] for part in ("lora_down.weight", "lora_up.weight", "alpha"))
        blocks, number, module, part = LAYER.fullmatch(name).groups()  # type: ignore[union-attr]  # checked above
        ups = (
            zip(("to_q", "to_k", "to_v"), up.chunk(3), strict=True) if part == "qkv" else [(PARTS.get(part, part), up)]
        )
        for own, rows in ups:
            layer = f"diffusion_model.{blocks}.{number}.{module}.{own}"
            renamed |= {f"{layer}.lora_down.weight": down.clone(), f"{layer}.lora_up.weight": rows.contiguous()}
            renamed[f"{layer}.alpha"] = alpha.clone()
    return renamed


def _of_one_width(lora: dict[str, Tensor]) -> bool:
    """Whether queries, keys and values have as many rows each as inputs; those of Lumina Image 2 have not."""
    names = {key.partition(".")[0] for key in lora if "_qkv." in key}
    sizes = ((len(lora[f"{name}.lora_up.weight"]), lora[f"{name}.lora_down.weight"].shape[1]) for name in names)
    return all(rows == 3 * width for rows, width in sizes)
