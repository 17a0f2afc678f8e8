"""What the demo U-Net sees: one latent per tile, an affine map of the tile's colour (constants only, no network).

Channels 0..2 are red, green, blue, standardised over the world's images; channel 3 is their mean. make_vae.py
builds the same map into an autoencoder. This is the scaled space, the one ComfyUI's SD1.5 latent format gives the
U-Net (VAE output times 0.18215).
"""

import torch

# Mean and standard deviation of tile colours (0..1) over a training pool, rounded and then fixed.
MEAN = (0.63, 0.60, 0.57)
STD = (0.31, 0.28, 0.31)
CHANNELS, LATENT_SCALE = 4, 0.18215


def to_latents(tiles: torch.Tensor) -> torch.Tensor:
    """uint8 [N, 16, 16, 3] to float [N, 4, 16, 16]."""
    colours = tiles.permute(0, 3, 1, 2).float() / 255
    standard = (colours - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]
    return torch.cat([standard, standard.mean(1, keepdim=True)], 1)


def to_tiles(latents: torch.Tensor) -> torch.Tensor:
    """float [N, 4, H, W] to uint8 [N, H, W, 3]; the fourth channel is redundant and ignored."""
    colours = latents[:, :3] * torch.tensor(STD)[:, None, None] + torch.tensor(MEAN)[:, None, None]
    return (colours.clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1)
