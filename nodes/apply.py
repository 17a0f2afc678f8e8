"""A run's result put onto a MODEL and a CLIP, as patches that every stock node honours."""

import comfy.sd

from ..trainers.run import RunResult
from . import carry

ENCODERS = ("clip_l",)


def apply(model, clip, result: RunResult, strength: float = 1.0):
    """Clones of `model` and `clip` that know the concept.

    Raises:
        ValueError: a LoRA that does not fit this CLIP.
    """
    _, patched = comfy.sd.load_lora_for_models(None, clip, result.lora, 0, strength)
    used = sum(len(p) for p in patched.patcher.patches.values()) - sum(len(p) for p in clip.patcher.patches.values())
    if used != len(result.lora) // 3:
        raise ValueError(f"Only {used} of {len(result.lora) // 3} LoRA layers fit this CLIP: it is of another family.")
    earlier = carry.of(clip)
    tokens = {token: dict(zip(ENCODERS, vectors, strict=True)) for token, vectors in result.tokens.items()}
    fixed = dict(zip(ENCODERS, result.fixed_outputs, strict=False))
    carried = carry.Carried(tokens=earlier.tokens | tokens, fixed_outputs=earlier.fixed_outputs | fixed)
    return model.clone(), carry.attach(patched, carried)
