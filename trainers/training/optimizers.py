"""The one optimizer, AdamW, with moments of 32 or 8 bits."""

import torch

ADAM: dict = {"betas": (0.9, 0.999), "eps": 1e-8}  # whatever the size of the moments
MOMENT_BITS = {"adamw": 32, "adamw8bit": 8}
WITHOUT_BITSANDBYTES = (
    "The optimizer adamw8bit needs the package bitsandbytes, which cannot be loaded here{why}: set optimizer to adamw "
    "(and fine_tuning to lora where memory is short), or install bitsandbytes into the Python that runs ComfyUI."
)


def adamw(params: list[dict], weight_decay: float, moment_bits: int = 32) -> torch.optim.Optimizer:
    """Return AdamW over groups of parameters.

    Args:
        moment_bits: bits of each of a value's two moments: 32, or 8 with bitsandbytes, which keeps small tensors
            (fewer than 4096 values) in 32 and one scale per 256 values.
    """
    if moment_bits == 8:
        return bitsandbytes_optimizers().AdamW8bit(params, weight_decay=weight_decay, **ADAM)
    on_card = all(parameter.is_cuda for group in params for parameter in group["params"])
    # The default takes 4 bytes per value more, for what it has not yet written back.
    return torch.optim.AdamW(params, weight_decay=weight_decay, fused=on_card or None, **ADAM)


def bytes_per_value(moment_bits: int) -> int:
    """Return the bytes of a trained value's two moments and of its gradient (in a checkpoint: of itself)."""
    return 4 + 2 * moment_bits // 8


def check(name: str) -> None:
    """Raise `ValueError` where the optimizer `name` cannot run here."""
    if MOMENT_BITS[name] == 8:
        bitsandbytes_optimizers()


def bitsandbytes_optimizers():
    """Import the optimizers of bitsandbytes, which is not a dependency of this pack.

    Raises:
        ValueError: it cannot be loaded.
    """
    try:
        from bitsandbytes import optim
    except Exception as error:  # one that is there but was built for another card fails in ways of its own
        why = "" if isinstance(error, ModuleNotFoundError) else f" ({type(error).__name__})"
        raise ValueError(WITHOUT_BITSANDBYTES.format(why=why)) from error
    return optim
