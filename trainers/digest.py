"""Digests of what decides a result, and random numbers from a run's own generator."""

import hashlib
from collections.abc import Iterable, Sequence

import torch
from torch import Generator, Tensor


def draw(generator: Generator, low: float = 0.0, high: float = 1.0) -> float:
    """Draw one number, uniform between `low` and `high`."""
    return low + (high - low) * torch.rand((), generator=generator).item()


def choose(options: Sequence, generator: Generator):
    """Draw one of `options`, all equally likely."""
    return options[int(torch.randint(len(options), (), generator=generator))]


def sampled(weight: Tensor, runs: int = 4, length: int = 64) -> Tensor:
    """Return a few stretches of a weight: enough to distinguish two models, quick for billions of parameters."""
    flat = weight.detach().flatten()
    starts = torch.linspace(0, max(0, len(flat) - length), runs).long().tolist()
    return torch.cat([flat[start : start + length] for start in starts]).float()


def digest_of(tensors: Iterable[Tensor], words: Iterable[str] = ()) -> str:
    """Return 16 hexadecimal digits of words and of the tensors' shapes and values, as float32."""
    sha = hashlib.sha256("\n".join(words).encode())
    for tensor in tensors:
        sha.update(str(tuple(tensor.shape)).encode())
        sha.update(tensor.detach().float().cpu().contiguous().numpy().tobytes())
    return sha.hexdigest()[:16]
