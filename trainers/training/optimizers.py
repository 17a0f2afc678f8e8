"""How a step changes the parameters: the optimizers, and the learning rate as a function of the step."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module

import torch

from ..settings import setting

ADAM: dict = {"betas": (0.9, 0.999), "eps": 1e-8}  # whatever the size of the moments
# Bytes of a trained value's gradient (in a checkpoint: of itself) and of what an optimizer remembers of it: two moments
# of 32 or of 8 bits; Prodigy also its first value and a sum of gradients.
BYTES_PER_VALUE = {"adamw": 12, "adamw8bit": 6, "prodigy": 20}
PACKAGES = {"adamw8bit": "bitsandbytes.optim", "prodigy": "prodigyopt"}
MISSING = (
    "The optimizer {name} needs the package {package}, which cannot be loaded here{why}: set optimizer to adamw, or "
    "install {package} into the Python that runs ComfyUI."
)
# What Prodigy keeps of a group of parameters: its estimate of the learning rate, the largest one, a sum, and the step.
KEPT = ("d", "d_max", "d_numerator", "k")
# Name -> factor of the learning rate at a progress in 0..1, from the end of the warm-up to the end of the stage.
SCHEDULES: dict[str, Callable[[float], float]] = {
    "constant": lambda progress: 1.0,
    "linear": lambda progress: 1 - progress,
    "cosine": lambda progress: (1 + math.cos(math.pi * progress)) / 2,
}


@dataclass(frozen=True, kw_only=True)
class Optimization:
    """Settings that every recipe has: the optimizer, and how its learning rates change."""

    weight_decay: float = setting(1e-2, "Weight decay of the optimizer.", min=0.0, max=1.0, advanced=True)
    optimizer: str = setting(
        "adamw",
        "AdamW; adamw8bit, with 8-bit moments, which needs less memory and the package bitsandbytes; or Prodigy, which "
        "finds the learning rate itself and does not use those that are set.",
        options=tuple(BYTES_PER_VALUE),
        advanced=True,
    )
    lr_scheduler: str = setting(
        "constant",
        "Learning rates during the steps of a stage: constant, or falling to 0 in a straight line or like a cosine.",
        options=tuple(SCHEDULES),
        advanced=True,
    )
    lr_warmup_steps: int = setting(
        0, "Steps at the beginning of a stage in which the learning rates rise from 0.", min=0, max=100_000,
        advanced=True,
    )  # fmt: skip

    @property
    def extends(self) -> bool:
        """Whether more steps can follow a training that is finished: no rate ends at 0, none has to be found again."""
        return self.lr_scheduler == "constant" and self.optimizer != "prodigy"

    def factor(self, step: int, steps: int) -> float:
        """Return what the learning rates of `step`, counted from 0, of a stage's `steps` are multiplied by."""
        if step < self.lr_warmup_steps:
            return step / self.lr_warmup_steps
        return SCHEDULES[self.lr_scheduler]((step - self.lr_warmup_steps) / max(1, steps - self.lr_warmup_steps))


def optimizer_of(params: list[dict], optimization: Optimization) -> torch.optim.Optimizer:
    """Return the optimizer of groups of parameters, which remain as they are."""
    kinds = {"adamw": adamw, "adamw8bit": adamw8bit, "prodigy": prodigy}
    return kinds[optimization.optimizer]([{**group} for group in params], optimization.weight_decay)


def set_learning_rates(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Set every group's learning rate to `factor` times the one that it began with."""
    for group in optimizer.param_groups:
        group["lr"] = factor * group.setdefault("initial_lr", group["lr"])


def adamw(params: list[dict], weight_decay: float) -> torch.optim.Optimizer:
    """Return torch's AdamW over groups of parameters."""
    on_card = all(parameter.is_cuda for group in params for parameter in group["params"])
    # The default takes 4 bytes per value more, for what it has not yet written back.
    return torch.optim.AdamW(params, weight_decay=weight_decay, fused=on_card or None, **ADAM)


def adamw8bit(params: list[dict], weight_decay: float) -> torch.optim.Optimizer:
    """Return AdamW with moments of 8 bits, but for small tensors (fewer than 4096 values); one scale per 256 values."""
    return imported("adamw8bit").AdamW8bit(params, weight_decay=weight_decay, **ADAM)


def prodigy(params: list[dict], weight_decay: float) -> torch.optim.Optimizer:
    """Return Prodigy (arXiv 2306.06101) with its authors' settings for diffusion models.

    The learning rate of each group is 1, which its estimate is multiplied by.
    """
    # Given for each group: the library prints a line for its own argument.
    groups = [{**group, "lr": 1.0, "weight_decay": weight_decay} for group in params]
    return imported("prodigy").Prodigy(groups, use_bias_correction=True, safeguard_warmup=True, **ADAM)


def check(name: str) -> None:
    """Raise `ValueError` where the optimizer `name` cannot run here."""
    if name in PACKAGES:
        imported(name)


def imported(name: str):
    """Import the module of the optimizer `name`.

    Raises:
        ValueError: it cannot be loaded.
    """
    try:
        return import_module(PACKAGES[name])
    except Exception as error:  # one that is there but was built for another card fails in ways of its own
        package = PACKAGES[name].partition(".")[0]
        why = "" if isinstance(error, ModuleNotFoundError) else f" ({type(error).__name__})"
        raise ValueError(MISSING.format(name=name, package=package, why=why)) from error
