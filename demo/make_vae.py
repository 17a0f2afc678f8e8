"""Builds the demo's autoencoder by hand, TAESD-shaped: a few convolutions are set, the rest is zero, none trained.

    python -m demo.make_vae demo/weights/vae.safetensors      (a second, one thread)

A residual block whose last convolution is zero passes non-negative channels on unchanged. Three stride-2 convolutions
that average 2 x 2 pixels make the exact mean of a tile (8 x 8 px); the last convolution is the affine map of
latents.py. The decoder undoes the clamp tanh(z / 3) * 3 by a piecewise linear function made of ReLUs, averages what
the redundant fourth channel says, cuts colours to 0..1 and repeats them over the tile. The file holds the
convolutions that are not zero; build.py adds the zeros.
"""

import argparse

import torch
from safetensors.torch import save_file

from .latents import CHANNELS, LATENT_SCALE, MEAN, STD

WIDTH = 64
KNOTS = 15


def _centre(outer: int, inner: int, taps: dict) -> torch.Tensor:
    """A 3 x 3 kernel that acts at its centre; taps is {(out, in): weight}."""
    kernel = torch.zeros(outer, inner, 3, 3)
    for (out, source), weight in taps.items():
        kernel[out, source, 1, 1] = weight
    return kernel


def _halving() -> torch.Tensor:
    """Mean of pixels 2i and 2i + 1 in both directions, for the first three channels (stride 2, padding 1)."""
    kernel = torch.zeros(WIDTH, WIDTH, 3, 3)
    for channel in range(3):
        kernel[channel, channel, 1:, 1:] = 0.25
    return kernel


def _affine() -> tuple:
    """Latents from colours: matrix [4, 3] and offset [4]."""
    rows = torch.diag(1 / torch.tensor(STD))
    offset = -torch.tensor(MEAN) / torch.tensor(STD)
    return torch.cat([rows, rows.mean(0, keepdim=True)]), torch.cat([offset, offset.mean(0, keepdim=True)])


def encoder() -> dict:
    """Colours 0..1 at full size to latents of one tile each."""
    matrix, offset = _affine()
    weights = {"0.weight": _centre(WIDTH, 3, {(i, i): 1.0 for i in range(3)})}
    weights |= {f"{layer}.weight": _halving() for layer in (2, 6, 10)}
    taps = {(i, j): matrix[i, j].item() for i in range(CHANNELS) for j in range(3)}
    return weights | {"14.weight": _centre(CHANNELS, WIDTH, taps), "14.bias": offset}


def _hinges() -> tuple:
    """Knots [15] and weights [16], the last a constant c, such that sum w relu(t - knot) + c = 3 artanh(t / 3)."""
    values = torch.linspace(-3.2, 3.2, 20001, dtype=torch.float64)
    clamped = 3 * torch.tanh(values / 3)
    knots = 3 * torch.tanh(torch.linspace(-3.2, 2.8, KNOTS, dtype=torch.float64) / 3)
    basis = torch.cat([(clamped[:, None] - knots).clamp(min=0), torch.ones(len(values), 1, dtype=torch.float64)], 1)
    # Values near 0 are the common ones: the world's colours lie between -2.2 and 1.5.
    importance = torch.where(values.abs() < 2.3, 1.0, 0.15).double()[:, None]
    return knots, torch.linalg.lstsq(basis * importance, values[:, None] * importance).solution[:, 0]


def decoder() -> dict:
    """Latents to colours: hinges, colours, 1 - colours (cut at 0), colours again (cut at 1)."""
    matrix, offset = _affine()
    back = torch.linalg.pinv(matrix.double())
    knots, slopes = _hinges()
    one = KNOTS * CHANNELS
    first = {(c * KNOTS + k, c): 1.0 for c in range(CHANNELS) for k in range(KNOTS)}
    colours = {
        (i, c * KNOTS + k): (back[i, c] * slopes[k]).item()
        for i in range(3)
        for c in range(CHANNELS)
        for k in range(KNOTS)
    }
    constant = back @ (slopes[-1] - offset.double())
    colours |= {(i, one): constant[i].item() for i in range(3)} | {(3, one): 1.0}
    bias = torch.zeros(WIDTH)
    bias[:one], bias[one] = -knots.float().repeat(CHANNELS), 1.0
    turned = {(i, i): -1.0 for i in range(3)} | {(i, 3): 1.0 for i in range(3)}
    kept = {(i, i): 1.0 for i in range(3)}
    weights = {"1.weight": _centre(WIDTH, CHANNELS, first), "1.bias": bias, "7.weight": _centre(WIDTH, WIDTH, colours)}
    weights |= {"12.weight": _centre(WIDTH, WIDTH, turned), "17.weight": _centre(WIDTH, WIDTH, kept)}
    last = _centre(3, WIDTH, {(i, i): -1.0 for i in range(3)})
    return weights | {"19.weight": last, "19.bias": torch.ones(3)}


def autoencoder() -> dict:
    """All convolutions that are not zero, by ComfyUI's names, fp16 except the scale of the latents."""
    weights = {f"taesd_encoder.{k}": v for k, v in encoder().items()} | {
        f"taesd_decoder.{k}": v for k, v in decoder().items()
    }
    weights = {f"first_stage_model.{k}": v.half() for k, v in weights.items()}
    scale = {
        "first_stage_model.vae_scale": torch.tensor(LATENT_SCALE),
        "first_stage_model.vae_shift": torch.tensor(0.0),
    }
    return weights | scale


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out")
    save_file(autoencoder(), parser.parse_args().out)
