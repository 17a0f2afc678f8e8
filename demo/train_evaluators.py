"""Trains the demo world's two evaluators.

    python -m demo.train_evaluators pictures|instance|clip|check --minutes M --work DIR

Took, on one thread of a two-core Xeon beside other work: pictures PICTURES, instance INSTANCE, clip CLIP.
Apart from the generator in everything: own seeds, individuals (EVALUATOR_SEEDS), pictures, text tower and token
rows. `check` states accuracies on individuals and pictures that training never saw. This file defines no
architecture: see evaluators.py.
"""

import argparse
import random
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from . import captions, check_evaluators, evaluators
from .evaluator_pictures import MEMBERS, VIEWS, pictures, scene
from .evaluator_training import Pool, Schedule, disturb, normalised, on_tiles, optimizer, report, save, stored

BLOCKS = 18000
SEED = 77
CONTRAST = 0.1
HALF = ((0.5,) * 3, (0.5,) * 3)


def make_pictures(work: Path):
    save_file({"tiles": torch.from_numpy(pictures(range(BLOCKS)))}, work / "evaluator_pictures.safetensors")


def agree(similarity: Tensor, positive: Tensor, candidate: Tensor) -> Tensor:
    """Contrastive loss: of all candidates, the positives should be likely. Self is neither."""
    candidate, positive = candidate.clone().fill_diagonal_(False), positive.clone().fill_diagonal_(False)
    logits = (similarity / CONTRAST).masked_fill(~candidate, -1e4)
    likely = F.log_softmax(logits, 1).masked_fill(~positive, 0)
    return -(likely.sum(1) / positive.sum(1).clamp(min=1)).mean()


def same(ids: Tensor) -> Tensor:
    return ids[:, None] == ids[None]


def instance_batch(pool: Pool, rng, blocks: int) -> tuple:
    """Two views of every member of some blocks: tiles [N, ...] and the row (block, member) of each."""
    chosen = pool.draw(rng, blocks)
    rows = [(b, m, v) for b in chosen for m in range(MEMBERS) for v in rng.sample(range(VIEWS), 2)]
    b, m, v = (torch.tensor(column) for column in zip(*rows, strict=True))
    return pool.tiles[b, m, v], b, m


def instance_losses(features: Tensor, heads, pool: Pool, b: Tensor, m: Tensor) -> dict:
    """Members 0..3 are Au, Av, Bu, Bv: m // 2 is the nameable set, m % 2 the never-named one."""
    unit = [F.normalize(x, dim=-1) for x in (features, heads.named(features), heads.unnamed(features))]
    similarity = [x @ x.T for x in unit]
    everything = torch.ones_like(similarity[0], dtype=torch.bool)
    subject = same(pool.labels["subject"][b, m])
    losses = {
        "identity": agree(similarity[0], same(b * 4 + m), everything),
        "named": 0.5 * agree(similarity[1], same(b * 2 + m // 2), everything),
        "unnamed": 0.5 * agree(similarity[2], same(b * 2 + m % 2), subject),
    }
    probes = (F.cross_entropy(probe(features), pool.labels[name][b, m]) for name, probe in heads.probes.items())
    return {**losses, "probes": 0.3 * sum(probes)}


def train_instance(work: Path, minutes: float, blocks: int = 24):
    import timm

    evaluators.register()
    pool, rng = Pool(work), random.Random(SEED)
    tower, heads = on_tiles(timm.create_model(evaluators.ENCODER_NAME)), evaluators.Heads()
    schedule = Schedule(optimizer([tower, heads]), minutes)
    saved = 0.0
    while schedule.now() < 1:
        tiles, b, m = instance_batch(pool, rng, blocks)
        with torch.autocast("cpu", torch.bfloat16):
            features = tower(disturb(normalised(tiles, *HALF)))
        losses = instance_losses(features.float(), heads, pool, b, m)
        schedule.step(sum(losses.values()))
        report(schedule, losses)
        if schedule.now() - saved > 0.2:
            saved = schedule.now()
            save_instance(work, tower, heads)
    save_instance(work, tower, heads)


def save_instance(work: Path, tower, heads):
    save(stored(tower), work / "evaluator_instance.safetensors")
    save(stored(heads), work / "evaluator_heads.safetensors")


def clip_batch(pool: Pool, rng, size: int) -> tuple:
    """One picture each of `size` blocks, with captions that name more than usual; some pictures lose their colour,
    and say so.
    """
    rows = [(b, rng.randrange(MEMBERS), rng.randrange(VIEWS)) for b in pool.draw(rng, size)]
    b, m, v = (torch.tensor(column) for column in zip(*rows, strict=True))
    gray = torch.tensor([rng.random() < 0.05 for _ in rows])
    scenes = [replace(scene(*row)[0], gray=g) for row, g in zip(rows, gray.tolist(), strict=True)]
    things = [pool.things[b][m] for b, m, _ in rows]
    texts = [
        captions.caption(t, s, rng, colour=0.8, pattern=0.7, extra=0.75) for t, s in zip(things, scenes, strict=True)
    ]
    tiles = pool.tiles[b, m, v].float()
    pale = (tiles @ torch.tensor((0.3, 0.59, 0.11)))[..., None].expand_as(tiles)
    return torch.where(gray[:, None, None, None], pale, tiles), texts


class Words:
    """Token ids of captions, renumbered so that only words of the world have rows.

    The end token stays the largest id.
    """

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        special = [tokenizer.sot_token_id, tokenizer.eot_token_id, 0]
        self.used = torch.tensor(sorted({*tokenizer.encode(captions.every_word()), *special}))

    def __call__(self, texts: list) -> Tensor:
        return torch.searchsorted(self.used, self.tokenizer(texts))


def clip_loss(images: Tensor, texts: Tensor, scale: Tensor, words: list) -> Tensor:
    """The usual symmetric one, but pictures with the same caption share it."""
    logits = scale.exp().clamp(max=100) * F.normalize(images, dim=-1) @ F.normalize(texts, dim=-1).T
    numbers = {text: index for index, text in enumerate(words)}
    target = same(torch.tensor([numbers[text] for text in words])).float()
    target = target / target.sum(1, keepdim=True)
    return 0.5 * (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target))


def train_clip(work: Path, minutes: float, size: int = 192):
    import open_clip

    evaluators.register()
    pool, rng = Pool(work), random.Random(SEED + 1)
    words = Words(open_clip.get_tokenizer(evaluators.CLIP_NAME))
    model = open_clip.create_model(evaluators.CLIP_NAME)
    model.token_embedding = nn.Embedding.from_pretrained(evaluators.unused_rows(128)[words.used], freeze=False)
    on_tiles(model.visual.trunk)
    normal = (open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD)
    schedule, saved = Schedule(optimizer([model]), minutes), 0.0
    while schedule.now() < 1:
        tiles, texts = clip_batch(pool, rng, size)
        with torch.autocast("cpu", torch.bfloat16):
            images = model.encode_image(disturb(normalised(tiles, *normal)))
            prompts = model.encode_text(words(texts))
        loss = clip_loss(images.float(), prompts.float(), model.logit_scale, texts)
        schedule.step(loss)
        report(schedule, {"contrastive": loss})
        if schedule.now() - saved > 0.2:
            saved = schedule.now()
            save_clip(work, model, words.used)
    save_clip(work, model, words.used)


def save_clip(work: Path, model, used: Tensor):
    state = stored(model)
    rows = state.pop(evaluators.ROWS)
    save({**state, "used_ids": used, "used_rows": rows}, work / "evaluator_clip.safetensors")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("pictures", "instance", "clip", "check"))
    parser.add_argument("--minutes", type=float, default=20)
    parser.add_argument("--work", type=Path, required=True)
    args = parser.parse_args()
    torch.manual_seed(SEED)
    torch.set_num_threads(1)
    if args.what == "pictures":
        make_pictures(args.work)
    elif args.what == "instance":
        train_instance(args.work, args.minutes)
    elif args.what == "clip":
        train_clip(args.work, args.minutes)
    else:
        check_evaluators.check(args.work)
