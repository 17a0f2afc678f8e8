"""LoRA layers that act in full precision at every use, instead of being merged into half-precision weights."""

import torch
from torch import Tensor


class LowRank:
    """Adds `scale * up @ down` to a weight whenever the host casts it for use."""

    def __init__(self, up: Tensor, down: Tensor, scale: float):
        self.up, self.down, self.scale = up, down, scale

    def __call__(self, weight: Tensor) -> Tensor:
        up, down = (part.to(weight.device, torch.float32).flatten(1) for part in (self.up, self.down))
        return weight + (self.scale * up @ down).view(weight.shape).to(weight.dtype)

    def move_to(self, device: torch.device) -> int:
        """Called by the host when it moves the model; returns the bytes that moved."""
        self.up, self.down = self.up.to(device), self.down.to(device)
        return self.up.nbytes + self.down.nbytes


def add(patcher, lora: dict[str, Tensor], keys: dict[str, str], strength: float) -> int:
    """Put the layers of a kohya LoRA that belong to this patcher onto it and return their number.

    Args:
        keys: name of a layer in the file -> the host's name of the weight.
    """
    layers = sorted(name.removesuffix(".lora_up.weight") for name in lora if name.endswith(".lora_up.weight"))
    layers = [name for name in layers if name in keys]
    for name in layers:
        up, down = lora[f"{name}.lora_up.weight"], lora[f"{name}.lora_down.weight"]
        scale = strength * float(lora[f"{name}.alpha"]) / len(down)
        patcher.add_weight_wrapper(keys[name], LowRank(up, down, scale))
    return len(layers)
