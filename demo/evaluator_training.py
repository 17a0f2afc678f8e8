"""What both evaluators' trainings share: images and what is done to them, the tile stem, the learning-rate schedule.

The losses and the two loops are train_evaluators.py's.
"""

import math
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from .evaluator_pictures import block
from .evaluators import ATTRIBUTES, visible
from .world import TILE

VALIDATION = 600


class Pool:
    """All images with their individuals. Tiles stay uint8; an image is addressed by (block, member, view)."""

    def __init__(self, work: Path):
        self.tiles = load_file(work / "evaluator_pictures.safetensors")["tiles"]
        self.things = [block(index) for index in range(len(self.tiles))]
        self.labels = {
            name: torch.tensor([[self._label(t, name) for t in four] for four in self.things]) for name in ATTRIBUTES
        }
        subjects = self.labels["subject"][: len(self.tiles) - VALIDATION, 0]
        self.by_subject = [torch.nonzero(subjects == s)[:, 0].tolist() for s in range(len(ATTRIBUTES["subject"]))]

    @staticmethod
    def _label(thing, name) -> int:
        return ATTRIBUTES[name].index(getattr(thing, name)) if visible(thing, name) else -100

    def draw(self, rng, blocks: int) -> list:
        """Training blocks of four classes, so that most negatives are of the same class."""
        return [
            index
            for s in rng.sample(range(len(self.by_subject)), 4)
            for index in rng.sample(self.by_subject[s], blocks // 4)
        ]


def normalised(tiles: Tensor, mean, std) -> Tensor:
    """uint8 [..., 16, 16, 3] -> float [N, 3, 16, 16] as the backbone's own preprocessing would scale it."""
    pixels = tiles.reshape(-1, *tiles.shape[-3:]).permute(0, 3, 1, 2).float() / 255
    return (pixels - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)


def disturb(x: Tensor, noise: Tensor | float = 0.16) -> Tensor:
    """What a diffusion sample does to tiles: noise, small shifts of colour, a little blur, the whole image off by a
    tile.

    Colour shifts stay near 2 % so that exact shades remain something to tell individuals apart by.
    """
    share = torch.rand(len(x), 1, 1, 1)
    x = x * torch.empty(len(x), 1, 1, 1).normal_(1, 0.015) + torch.empty(len(x), 3, 1, 1).normal_(0, 0.02)
    blurred = F.avg_pool2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), 3, 1)
    x = torch.lerp(x, blurred, 0.2 * torch.rand(len(x), 1, 1, 1).square())
    padded = F.pad(x, (1, 1, 1, 1), mode="replicate")
    dy, dx = torch.randint(0, 3, (2,)).tolist()
    return padded[..., dy : dy + x.shape[2], dx : dx + x.shape[3]] + noise * share.square() * torch.randn_like(x)


class TileStem(nn.Conv2d):
    """The stem while training: images are flat tiles, so a mean over each tile and a 1 x 1 layer are exact, and 64
    times cheaper.
    """

    def full(self) -> Tensor:
        return (self.weight / TILE**2).expand(-1, -1, TILE, TILE)


def on_tiles(tower: nn.Module) -> nn.Module:
    """The tower with a stem that reads 16 x 16 tiles instead of 128 px, and the same answer for flat tiles."""
    weight = tower.stem[0].weight.detach().sum((2, 3), keepdim=True)
    tower.stem[0] = TileStem(3, tower.stem[0].out_channels, 1, bias=False)
    with torch.no_grad():
        tower.stem[0].weight.copy_(weight)
    return tower


def stored(model: nn.Module) -> dict:
    """Half-precision weights under the names that the loaders expect, with the stem for 128 px."""
    state = {name: value.half() if value.is_floating_point() else value for name, value in model.state_dict().items()}
    stems = {
        f"{name}.weight": module.full().half() for name, module in model.named_modules() if isinstance(module, TileStem)
    }
    return {name: value.detach().contiguous() for name, value in {**state, **stems}.items()}


def save(tensors: dict, path: Path):
    """Atomic: a reader never sees half a file."""
    save_file(tensors, path.with_suffix(".tmp"))
    path.with_suffix(".tmp").replace(path)


class Schedule:
    """Learning rate over a time budget: short warm-up, then a cosine to zero. now() is the share of the budget that
    is spent.
    """

    def __init__(self, optimizer, minutes: float):
        self.optimizer, self.seconds, self.start = optimizer, minutes * 60, time.time()
        self.rates, self.steps = [group["lr"] for group in optimizer.param_groups], 0

    def now(self) -> float:
        return (time.time() - self.start) / self.seconds

    def step(self, loss: Tensor):
        self.steps += 1
        scale = min(1, self.steps / 100) * 0.5 * (1 + math.cos(math.pi * min(1, self.now())))
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = rate * scale
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()


def optimizer(modules) -> torch.optim.Optimizer:
    parameters = [p for module in modules for p in module.parameters()]
    decayed = [p for p in parameters if p.ndim > 1]
    plain = [{"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0}]
    return torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.05}, *plain], lr=1.5e-3, betas=(0.9, 0.98), fused=True
    )


def report(schedule: Schedule, losses: dict):
    if schedule.steps % 50 == 0:
        text = " ".join(f"{name} {value.item():.3f}" for name, value in losses.items())
        print(f"{schedule.now():.3f} step {schedule.steps} {text}", flush=True)
