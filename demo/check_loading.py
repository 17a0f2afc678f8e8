"""Checks the checkpoint in ComfyUI's loader against transformers and diffusers, and measures the autoencoder.

    python -m demo.check_loading COMFYUI CHECKPOINT TRAINING_FORM      (half a minute, one thread)

TRAINING_FORM is what train_unet.py wrote and export.py turned into weights/. Prints greatest differences and
decibels.
"""

import argparse
import random
import sys

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from . import world
from .latents import LATENT_SCALE, to_latents
from .sample import untrained_unet
from .text import Vocabulary, text_encoder


def load_in_comfy(comfyui: str, checkpoint: str) -> tuple:
    """(model, clip, vae) from the stock loading function."""
    sys.path.insert(0, comfyui)
    sys.argv = [sys.argv[0], "--cpu"]
    import comfy.options

    comfy.options.enable_args_parsing()
    import comfy.sd

    from . import architecture

    architecture.register()
    return comfy.sd.load_checkpoint_guess_config(checkpoint)[:3]


def training_form(path: str, words: Vocabulary) -> tuple:
    """(U-Net, text encoder) as trained, rounded to fp16 as the exported files are."""
    weights, unet, text = load_file(path), untrained_unet(), text_encoder(words.size)
    for name, model in (("unet.", unet), ("text.", text)):
        model.load_state_dict({k[5:]: v.half().float() for k, v in weights.items() if k.startswith(name)})
    return unet.eval(), text.eval()


def text_difference(clip, text, words) -> float:
    prompts = ["", "a photo of a black cat with a red hat in the snow", "a sketch of a dog, horizontally flipped"]
    ours = text(words.encode(prompts)).last_hidden_state
    theirs = torch.cat([clip.encode_from_tokens(clip.tokenize(prompt)) for prompt in prompts])
    return (ours - theirs).abs().max().item()


def unet_difference(model, unet) -> float:
    import comfy.model_management

    comfy.model_management.load_models_gpu([model])
    generator = torch.Generator().manual_seed(0)
    noisy, context = torch.randn(2, 4, 16, 16, generator=generator), torch.randn(2, 77, 128, generator=generator)
    times = torch.tensor([20, 700])
    theirs = model.model.diffusion_model(noisy, times, context=context)
    ours = unet(noisy, times, context).sample
    print("U-Net outputs: mean magnitude", ours.abs().mean().item())
    return (ours - theirs.float()).abs().max().item()


def decibels(one, other) -> float:
    return (-10 * ((one - other) ** 2).mean().log10()).item()


def autoencoder_report(vae):
    rng = random.Random(7)
    tiles = np.stack([world.draw(world.instance(seed), world.sample_scene(rng), rng) for seed in world.TEST_SEEDS[:8]])
    full = torch.from_numpy(tiles).repeat_interleave(8, 1).repeat_interleave(8, 2).float() / 255
    latents = vae.encode(full)
    print(
        "latents against the affine map, greatest difference",
        (latents * LATENT_SCALE - to_latents(torch.from_numpy(tiles))).abs().max().item(),
    )
    print("aligned pictures, dB", decibels(vae.decode(latents), full))
    chw = full[:2].movedim(-1, 1)
    views = {
        "shifted by 3 px": chw.roll((3, 3), (2, 3)),
        "128 px to 96 px (area)": F.interpolate(chw, size=(96, 96), mode="area"),
        "128 px to 512 px (bilinear)": F.interpolate(chw, size=(512, 512), mode="bilinear"),
        "512 px nearest": F.interpolate(chw, size=(512, 512), mode="nearest"),
    }
    for name, view in views.items():
        back = vae.decode(vae.encode(view.movedim(1, -1))).movedim(-1, 1)
        mean = F.interpolate(F.avg_pool2d(view, 8), scale_factor=8, mode="nearest")
        print(f"{name}, dB: {decibels(back, view):.1f} against the view, {decibels(back, mean):.1f} against its means")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name in ("comfyui", "checkpoint", "training_form"):
        parser.add_argument(name)
    options = parser.parse_args()
    torch.set_num_threads(1)
    words = Vocabulary(f"{options.comfyui}/comfy/sd1_tokenizer")
    unet, text = training_form(options.training_form, words)
    model, clip, vae = load_in_comfy(options.comfyui, options.checkpoint)
    with torch.inference_mode():
        print("text encoder, greatest difference", text_difference(clip, text, words))
        print("U-Net, greatest difference", unet_difference(model, unet))
        autoencoder_report(vae)
