"""Trains the demo world's two evaluators.

    python -m demo.train_evaluators images|instance|clip|check --minutes M --work DIR

Took, on one thread of a two-core Xeon that also trained the generator: images 4 minutes, instance 20, clip 59 in
three goes: 20 without near misses and with a fresh image tower, 14 as below on the first one's text tower, 25
--go-on.
Apart from the generator in everything: own seeds, individuals (EVALUATOR_SEEDS), images, text tower and token rows.
`check` states accuracies on individuals and images that training never saw (1600 images of 800 individuals; CLIP:
400 images). Probes on whole photos: class .995, colour .99, second colour .99, pattern .92, accessory .82, its
colour .97, period .97. The other image of an individual among all of its class, three near doubles of it included:
first in .85. CLIP zero-shot: class .95, colour .94, pattern .79, place .96, style .99, accessory with its colour (of
40) .27; the right one of 400 full captions .99. This file defines no architecture: see evaluators.py.
"""

import argparse
import random
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from . import captions, check_evaluators, evaluators
from .evaluator_pictures import MEMBERS, VIEWS, pictures, scene
from .evaluator_training import Pool, Schedule, disturb, normalised, on_tiles, optimizer, report, save, stored
from .evaluators import ATTRIBUTES
from .world import Instance, Scene

BLOCKS = 18000
SEED = 77
CONTRAST = 0.1
HALF = ((0.5,) * 3, (0.5,) * 3)
# open_clip's own normalisation: the mean and deviation that it was first trained with.
COLOURS_OF_CLIP = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))


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
    """One image each of `size` blocks, its caption, and a near miss: the caption with one detail changed.

    Captions name more than usual. Some images lose their colour, and their captions say so.
    """
    rows = [(b, rng.randrange(MEMBERS), rng.randrange(VIEWS)) for b in pool.draw(rng, size)]
    b, m, v = (torch.tensor(column) for column in zip(*rows, strict=True))
    gray = [rng.random() < 0.05 for _ in rows]
    scenes = [replace(scene(*row)[0], gray=pale) for row, pale in zip(rows, gray, strict=True)]
    things = [pool.things[b][m] for b, m, _ in rows]
    numbers = [rng.random() for _ in rows]  # the same wording for both
    texts = [wording(*pair) for pair in zip(things, scenes, numbers, strict=True)]
    misses = [wording(changed(t, rng), s, number) for t, s, number in zip(things, scenes, numbers, strict=True)]
    return faded(pool.tiles[b, m, v].float(), torch.tensor(gray)), texts, misses


def wording(thing: Instance, where: Scene, number: float) -> str:
    return captions.caption(thing, where, random.Random(number), colour=0.8, pattern=0.7, extra=0.8)


def changed(thing: Instance, rng) -> Instance:
    """The individual with another class, colour, pattern, accessory or colour of the accessory."""
    name = rng.choice(("subject", "colour", "pattern", "extra", "extra_colour"))
    return replace(
        thing, **{name: rng.choice([answer for answer in ATTRIBUTES[name] if answer != getattr(thing, name)])}
    )


def faded(tiles: Tensor, gray: Tensor) -> Tensor:
    luma = tiles @ torch.tensor((0.3, 0.59, 0.11))
    return torch.where(gray[:, None, None, None], luma[..., None].expand_as(tiles), tiles)


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
    """The usual symmetric one, but images with the same caption share it, and near misses compete for every image.

    texts and words hold the images' own captions first, then the near misses.
    """
    count = len(images)
    logits = scale.exp().clamp(max=100) * F.normalize(images, dim=-1) @ F.normalize(texts, dim=-1).T
    numbers = {text: index for index, text in enumerate(words)}
    target = same(torch.tensor([numbers[text] for text in words])).float()[:count]
    back = target[:, :count] / target[:, :count].sum(1, keepdim=True)
    forth = F.cross_entropy(logits, target / target.sum(1, keepdim=True))
    return 0.5 * (forth + F.cross_entropy(logits[:, :count].T, back))


def start_clip(work: Path, go_on: Path | None):
    """The model of an earlier file; else a fresh text tower, and an image tower that starts from the instance encoder's
    convolutions, which already see details.
    """
    import open_clip

    model = open_clip.create_model(evaluators.CLIP_NAME, load_weights=False)
    words = Words(open_clip.get_tokenizer(evaluators.CLIP_NAME))
    model.token_embedding = nn.Embedding.from_pretrained(evaluators.unused_rows(128)[words.used], freeze=False)
    if go_on:
        state = load_file(go_on)
        state[evaluators.ROWS] = state.pop("used_rows")
        model.load_state_dict({name: state[name] for name in model.state_dict()})
    else:
        known = load_file(work / "evaluator_instance.safetensors")
        tower = model.visual.trunk
        tower.load_state_dict({name: known[name] for name in tower.state_dict()})
    on_tiles(model.visual.trunk)
    return model, words


def train_clip(work: Path, minutes: float, go_on: Path | None = None, size: int = 192):
    evaluators.register()
    pool, rng = Pool(work), random.Random(SEED + 1)
    model, words = start_clip(work, go_on)
    schedule, saved = Schedule(optimizer([model]), minutes), 0.0
    while schedule.now() < 1:
        tiles, texts, misses = clip_batch(pool, rng, size)
        with torch.autocast("cpu", torch.bfloat16):
            images = model.encode_image(disturb(normalised(tiles, *COLOURS_OF_CLIP)))
            prompts = model.encode_text(words(texts + misses))
        loss = clip_loss(images.float(), prompts.float(), model.logit_scale, texts + misses)
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
    parser.add_argument("--go-on", type=Path, help="an earlier evaluator_clip.safetensors to continue")
    args = parser.parse_args()
    torch.manual_seed(SEED)
    torch.set_num_threads(1)
    if args.what == "pictures":
        make_pictures(args.work)
    elif args.what == "instance":
        train_instance(args.work, args.minutes)
    elif args.what == "clip":
        train_clip(args.work, args.minutes, args.go_on)
    else:
        check_evaluators.check(args.work)
