"""First training: the tiny text encoder learns to match captions with images (contrastive, as CLIP does).

    python -m demo.train_text_encoder .dev/train/pool.safetensors TOKENIZER .dev/train/text.safetensors --minutes 14

Without it the U-Net ignores the text for a long time. The image side is thrown away afterwards; it scores nothing.
One thread, bf16 autocast. Output: the text encoder with the compact vocabulary, transformers' names, fp32.
"""

import argparse
import math
import random
import time

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn

from .captions import caption
from .pool import Pool
from .text import END, WIDTH, Vocabulary, at_end, new_strangers, text_encoder
from .world import COLOURS

BATCH, RATE = 192, 1e-3


def picture_encoder() -> nn.Module:
    def layer(inner, outer, stride):
        return [nn.Conv2d(inner, outer, 3, stride, 1, bias=False), nn.BatchNorm2d(outer), nn.ReLU()]

    convolutions = [*layer(3, 48, 1), *layer(48, 96, 2), *layer(96, 128, 1), *layer(128, 192, 2), *layer(192, 192, 1)]
    return nn.Sequential(*convolutions, nn.Flatten(), nn.Linear(192 * 16, 256), nn.ReLU(), nn.Linear(256, WIDTH))


class Matcher(nn.Module):
    """Scores every image of a batch against every caption of it."""

    def __init__(self, words: Vocabulary):
        super().__init__()
        self.text, self.pictures, self.project = text_encoder(words.size), picture_encoder(), nn.Linear(WIDTH, WIDTH)
        self.sharpness = nn.Parameter(torch.tensor(2.6))
        self.end = words.compact[END]

    def embed(self, tiles, ids):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            seen = self.pictures(tiles)
            read = self.project(at_end(self.text(ids).last_hidden_state, ids, self.end))
        return F.normalize(seen.float(), dim=-1), F.normalize(read.float(), dim=-1)

    def forward(self, tiles, ids):
        seen, read = self.embed(tiles, ids)
        return self.sharpness.exp().clamp(max=100) * seen @ read.T


def batch_of(pool, words, rng, size: int):
    picks = [rng.randrange(len(pool) - 2000) for _ in range(size)]
    texts = [caption(*pool.content(i), rng, colour=0.85, pattern=0.7, extra=0.7) for i in picks]
    tiles = torch.from_numpy(pool.tiles[picks]).permute(0, 3, 1, 2).float() / 127.5 - 1
    return tiles, words.encode(texts, rng, strange=0.05, full=rng.random() < 0.15)


@torch.no_grad()
def colour_accuracy(matcher, pool, words, count: int = 300) -> float:
    """Share of held-out images (no sketch, no grayscale) whose best of ten colour words is right."""
    matcher.eval()
    right = total = 0
    for index in range(len(pool) - 1, len(pool) - 2000, -3):
        thing, scene = pool.content(index)
        if scene.gray or scene.style == "sketch" or total == count:
            continue
        texts = [f"a {scene.style} of a {colour} {thing.subject} {scene.background}" for colour in COLOURS]
        tiles = torch.from_numpy(pool.tiles[index : index + 1]).permute(0, 3, 1, 2).float() / 127.5 - 1
        seen, read = matcher.embed(tiles, words.encode(texts))
        right, total = right + (list(COLOURS)[int((read @ seen[0]).argmax())] == thing.colour), total + 1
    matcher.train()
    return right / total


def train(pool, words, minutes: float) -> Matcher:
    matcher, rng, step, start = Matcher(words), random.Random(2), 0, time.time()
    optimiser = torch.optim.AdamW(matcher.parameters(), lr=RATE, fused=True)
    target = torch.arange(BATCH)
    while (done := (time.time() - start) / 60 / minutes) < 1:
        for group in optimiser.param_groups:
            group["lr"] = RATE * min(1, (step + 1) / 50) * (0.03 + 0.97 * 0.5 * (1 + math.cos(math.pi * done)))
        new_strangers(matcher.text)
        score = matcher(*batch_of(pool, words, rng, BATCH))
        loss = (F.cross_entropy(score, target) + F.cross_entropy(score.T, target)) / 2
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        optimiser.step()
        step += 1
        if step % 50 == 0:
            print(f"{done * minutes * 60:.0f} s, step {step}, loss {loss.item():.3f}", flush=True)
    return matcher


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("pool")
    parser.add_argument("tokenizer")
    parser.add_argument("out")
    parser.add_argument("--minutes", type=float, default=14)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    pool, words = Pool(options.pool), Vocabulary(options.tokenizer)
    matcher = train(pool, words, options.minutes)
    save_file({k: v.contiguous() for k, v in matcher.text.state_dict().items()}, options.out)
    print("colour accuracy on held-out pictures", colour_accuracy(matcher, pool, words), flush=True)
