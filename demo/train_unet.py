"""Second training: the U-Net, and the text encoder along with it, on the latents of the pool.

    cd .dev/train
    PYTHONPATH=../.. python -m demo.train_unet pool.safetensors TOKENIZER text.safetensors model.safetensors

Noise prediction, scaled-linear schedule 0.00085 .. 0.012, min-SNR weights (gamma 5), tiles of patterns and
accessories four times as heavy as the others, 10 % empty captions, EMA 0.999,
AdamW 1e-3 with the rate falling to zero over the last 40 % of the time. One thread, bf16 autocast, batches of 64.
Every few minutes it writes the EMA weights (safetensors, keys unet.* and text.*, compact vocabulary) and a sheet of
samples beside them.
"""

import argparse
import datetime
import math
import os
import random
import time

import torch
from diffusers import DDPMScheduler
from safetensors.torch import load_file, save_file

from .captions import caption
from .latents import to_latents
from .pool import Pool
from .sample import NOISE, prompt_sheet, untrained_unet
from .text import Vocabulary, new_strangers, text_encoder

RATE, WARM_UP, GAMMA, EMPTY, LONG = 1e-3, 80, 5.0, 0.1, 0.25
# Patterns and accessories are few of 256 tiles and hardly count in a plain mean; no optimum depends on the weight.
DETAIL = 4.0
# More captions than the default ones name details: words are what this model learns last.
NAMED = dict(colour=0.9, pattern=0.85, extra=0.9)


class Average:
    """Exponential moving average of parameters, and the swap that puts it in their place."""

    def __init__(self, parameters):
        self.parameters, self.mean, self.step = parameters, [p.detach().clone() for p in parameters], 0

    def update(self):
        self.step += 1
        keep = min(0.999, (1 + self.step) / (10 + self.step))
        torch._foreach_lerp_(self.mean, [p.detach() for p in self.parameters], 1 - keep)

    def swap(self):
        for parameter, mean in zip(self.parameters, self.mean):
            parameter.data, mean.data = mean.data, parameter.data


def share_at(done: float, step: int, warm_up: int = WARM_UP) -> float:
    """Share of the learning rate: short warm-up, level, then a half cosine to zero over the last 40 % of the time."""
    fall = 1 if done < 0.6 else 0.5 * (1 + math.cos(math.pi * min(1, (done - 0.6) / 0.4)))
    return fall * min(1, (step + 1) / warm_up)


def batch_of(pool, words, rng, size: int):
    picks = [rng.randrange(len(pool)) for _ in range(size)]
    texts = ["" if rng.random() < EMPTY else caption(*pool.content(i), rng, **NAMED) for i in picks]
    ids = words.encode(texts, rng, strange=0.05, full=rng.random() < LONG)
    weights = 1 + (DETAIL - 1) * torch.from_numpy(pool.details[picks]).float()
    return to_latents(torch.from_numpy(pool.tiles[picks])), weights[:, None], ids


def weighted_loss(unet, text, alphas, latents, weights, ids):
    """Min-SNR weighted noise prediction error, [] from latents [N, 4, 16, 16] and weights of tiles [N, 1, 16, 16]."""
    times, noise = torch.randint(0, 1000, (len(latents),)), torch.randn_like(latents)
    alpha = alphas[times][:, None, None, None]
    noisy = alpha.sqrt() * latents + (1 - alpha).sqrt() * noise
    with torch.autocast("cpu", dtype=torch.bfloat16):
        guess = unet(noisy, times, text(ids).last_hidden_state).sample
    ratio = alphas[times] / (1 - alphas[times])
    return ((weights * (guess.float() - noise) ** 2).mean((1, 2, 3)) * ratio.clamp(max=GAMMA) / ratio).mean()


def save(path: str, unet, text, words, average):
    """EMA weights and samples, written beside and then moved into place."""
    average.swap()
    new_strangers(text)
    weights = {f"unet.{k}": v for k, v in unet.state_dict().items()} | {
        f"text.{k}": v for k, v in text.state_dict().items()
    }
    save_file({k: v.contiguous().clone() for k, v in weights.items()}, path + ".part")
    os.replace(path + ".part", path)
    prompt_sheet(unet, text, words).save(path.replace(".safetensors", ".png"))
    average.swap()


def make_optimiser(unet, text, text_rate: float):
    """AdamW over both; the text encoder learns at a share of the rate, token rows do not decay."""
    table = text.get_input_embeddings().weight
    groups = [
        {"params": list(unet.parameters()), "weight_decay": 1e-2, "share": 1.0},
        {"params": [p for p in text.parameters() if p is not table], "weight_decay": 1e-2, "share": text_rate},
        {"params": [table], "weight_decay": 0.0, "share": text_rate},
    ]
    return torch.optim.AdamW(groups, lr=RATE, betas=(0.9, 0.99), fused=True)


def train(pool, words, unet, text, options, seconds: float):
    parameters = [*unet.parameters(), *text.parameters()]
    optimiser, average = make_optimiser(unet, text, options.text_rate), Average(parameters)
    alphas, rng = DDPMScheduler(**NOISE).alphas_cumprod, random.Random(options.seed)
    start, saved, step, losses = time.time(), time.time(), 0, []
    while (spent := time.time() - start) < seconds:
        for group in optimiser.param_groups:
            group["lr"] = group["share"] * RATE * share_at(spent / seconds, step)
        new_strangers(text)
        loss = weighted_loss(unet, text, alphas, *batch_of(pool, words, rng, options.batch))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        average.update()
        step += 1
        losses.append(loss.item())
        if step % 50 == 0:
            print(f"{spent:.0f} s, step {step}, loss {sum(losses[-50:]) / 50:.4f}", flush=True)
        if time.time() - saved > options.every:
            save(options.out, unet, text, words, average)
            saved = time.time()
    save(options.out, unet, text, words, average)
    print(f"done: {step} steps of {options.batch}, {time.time() - start:.0f} s", flush=True)


def start(path: str, unet, text):
    """Loads the text encoder of the first training, or U-Net and text encoder of an earlier run of this one."""
    weights = load_file(path)
    if "conv_in.weight" not in {name.removeprefix("unet.") for name in weights}:
        text.load_state_dict(weights)
        return
    for prefix, model in (("unet.", unet), ("text.", text)):
        model.load_state_dict({k[5:]: v for k, v in weights.items() if k.startswith(prefix)})


def seconds_until(clock: str) -> float:
    """Seconds to the next HH:MM, UTC."""
    now = datetime.datetime.now(datetime.timezone.utc)
    end = now.replace(hour=int(clock[:2]), minute=int(clock[3:]), second=0)
    return ((end - now).total_seconds()) % 86400


def started(parser: argparse.ArgumentParser, minutes: float) -> tuple:
    """(options, seconds to train) with the options that every training has; one thread and the seed are set."""
    parser.add_argument("--until", default="", help="end at HH:MM UTC instead of after --minutes")
    parser.add_argument("--minutes", type=float, default=minutes)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--every", type=float, default=300, help="seconds between checkpoints")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(options.seed)
    return options, seconds_until(options.until) if options.until else options.minutes * 60


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name in ("pool", "tokenizer", "text", "out"):
        parser.add_argument(name)
    parser.add_argument("--text-rate", type=float, default=1.0, help="share of the rate for the text encoder")
    options, seconds = started(parser, minutes=75)
    words, unet = Vocabulary(options.tokenizer), untrained_unet()
    text = text_encoder(words.size)
    start(options.text, unet, text)
    train(Pool(options.pool), words, unet, text, options, seconds)
