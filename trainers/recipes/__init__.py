"""The methods, one file each."""

from collections.abc import Mapping

from . import (
    attndreambooth,
    custom_diffusion,
    dreambooth_lora,
    lora,
    t_lora,
    textboost,
    textboost_2026,
    textual_inversion,
)
from .base import Recipe

# Display name of a node -> its presets, the first of which is the default.
METHODS: dict[str, Mapping[str, Recipe]] = {
    "TextBoost": {**textboost.PRESETS, **textboost_2026.PRESETS},
    "AttnDreamBooth": attndreambooth.PRESETS,
    "Textual Inversion": textual_inversion.PRESETS,
    "DreamBooth-LoRA": dreambooth_lora.PRESETS,
    "Custom Diffusion": custom_diffusion.PRESETS,
    "T-LoRA": t_lora.PRESETS,
    "LoRA": lora.PRESETS,
}


def names_of(recipe: Recipe) -> tuple[str, str]:
    """Return the display names of a recipe's method and of the preset whose settings it has, "" for none."""
    kinds = {type(preset): method for method, presets in METHODS.items() for preset in presets.values()}
    method = kinds[type(recipe)]
    return method, next((name for name, preset in METHODS[method].items() if preset == recipe), "")
