"""Third training: the flow-matching transformer, on the latents of the pool and with the finished text encoder.

    python -m demo.train_transformer POOL TOKENIZER demo/weights transformer.safetensors

Velocity prediction, noise levels logit-normal with the model's shift (as Stable Diffusion 3 and Z-Image train), tiles
of patterns and accessories four times as heavy as the others, 10 % empty captions, EMA 0.999. Muon for the blocks'
matrices, AdamW for everything else, rates falling to zero over the last 40 % of the time. One thread, bf16; the
blocks are compiled, which needs a C++ compiler and a minute.
"""

import argparse
import os
import random
import time
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from .captions import caption
from .export import load_exported
from .latents import to_latents
from .pool import Pool
from .sample import PROMPTS
from .text import Vocabulary, new_strangers
from .train_unet import DETAIL, EMPTY, NAMED, Average, share_at, started
from .transformer import Captions, block, prompt_sheet, shifted, untrained_transformer, velocity

MATRIX_RATE, RATE, WARM_UP = 1e-2, 1e-3, 100


def batch_of(pool, encoded, rng, size: int) -> tuple:
    """Latents [N, 4, 16, 16], weights of tiles [N, 1, 16, 16], (context, lengths)."""
    picks = [rng.randrange(len(pool)) for _ in range(size)]
    texts = ["" if rng.random() < EMPTY else caption(*pool.content(i), rng, **NAMED) for i in picks]
    weights = 1 + (DETAIL - 1) * torch.from_numpy(pool.details[picks]).float()
    return to_latents(torch.from_numpy(pool.tiles[picks])), weights[:, None], encoded(texts, rng)


def velocity_loss(weights, block, latents, heavy, context) -> torch.Tensor:
    """Weighted mean of (v - (noise - latents))^2, []."""
    sigmas, noise = shifted(torch.randn(len(latents)).sigmoid()), torch.randn_like(latents)
    at = sigmas[:, None, None, None]
    guess = velocity(weights, (1 - at) * latents + at * noise, sigmas, *context, block=block)
    return (heavy * (guess - (noise - latents)) ** 2).mean()


def make_optimisers(weights: dict) -> list:
    """[(optimiser, rate)]: Muon over the blocks' matrices, AdamW over the rest."""
    blocks = ("layers.", "noise_refiner.", "context_refiner.")
    inside = [n for n, w in weights.items() if n.startswith(blocks) and w.dim() == 2 and "adaLN" not in n]
    matrices, rest = [weights[n] for n in inside], [w for n, w in weights.items() if n not in inside]
    muon = torch.optim.Muon(matrices, lr=MATRIX_RATE, weight_decay=1e-2, momentum=0.95)
    return [
        (muon, MATRIX_RATE),
        (torch.optim.AdamW(rest, RATE, betas=(0.9, 0.99), weight_decay=1e-2, fused=True), RATE),
    ]


def save(path: str, weights: dict, encoded, average):
    """EMA weights and samples, written beside and then moved into place."""
    average.swap()
    save_file({name: value.detach().contiguous() for name, value in weights.items()}, path + ".part")
    os.replace(path + ".part", path)
    prompt_sheet(weights, encoded, PROMPTS).save(path.replace(".safetensors", ".png"))
    average.swap()


def train(pool, encoded, weights: dict, options, seconds: float):
    parameters, compiled = list(weights.values()), torch.compile(block, dynamic=False)
    optimisers, average = make_optimisers(weights), Average(parameters)
    rng, begin, saved, step, losses = random.Random(options.seed), time.time(), time.time(), 0, []
    while (spent := time.time() - begin) < seconds:
        new_strangers(encoded.text)
        loss = velocity_loss(weights, compiled, *batch_of(pool, encoded, rng, options.batch))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        for optimiser, rate in optimisers:
            optimiser.param_groups[0]["lr"] = rate * share_at(spent / seconds, step, WARM_UP)
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
        average.update()
        step += 1
        losses.append(loss.item())
        if step % 50 == 0:
            print(f"{spent:.0f} s, step {step}, loss {sum(losses[-50:]) / 50:.4f}", flush=True)
        if time.time() - saved > options.every:
            save(options.out, weights, encoded, average)
            saved = time.time()
    save(options.out, weights, encoded, average)
    print(f"done: {step} steps of {options.batch}, {time.time() - begin:.0f} s", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name in ("pool", "tokenizer", "weights", "out"):
        parser.add_argument(name)
    parser.add_argument("--begin", default="", help="weights of an earlier run to go on from")
    options, seconds = started(parser, minutes=110)
    words = Vocabulary(options.tokenizer)
    text, weights = load_exported(Path(options.weights), words)[1], untrained_transformer()
    if options.begin:
        weights = {name: torch.nn.Parameter(value) for name, value in load_file(options.begin).items()}
    train(Pool(options.pool), Captions(text, words), weights, options, seconds)
