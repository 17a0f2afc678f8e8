"""How far the evaluators can be trusted: accuracies on individuals and images that their training never saw.

Goes through evaluators.load(), so it measures the stored half-precision files at 128 px as everyone else uses them.
"""

from pathlib import Path

import torch
from safetensors.torch import load_file

from . import captions, evaluators, world
from .evaluator_pictures import MEMBERS, block, scene
from .evaluators import metrics

BLOCKS, VIEWS = 200, 2


def check(work: Path, weights: Path | None = None):
    """Print every figure. work holds the images; its last BLOCKS blocks are no training data."""
    tiles = load_file(work / "evaluator_pictures.safetensors")["tiles"]
    indices = range(len(tiles) - BLOCKS, len(tiles))
    rows = [(index, member, view) for index in indices for member in range(MEMBERS) for view in range(VIEWS)]
    images = [world.picture(tiles[row].numpy()) for row in rows]
    things, scenes = [block(index)[member] for index, member, _ in rows], [scene(*row)[0] for row in rows]
    metric_models = evaluators.load(weights=weights or work)
    _probes(metric_models, images, things, scenes)
    _retrieval(metric_models, images, things)
    _captions(metric_models, images, things, scenes)


def _probes(metric_models, images, things, scenes):
    whole = [s.style == "photo" and not (s.cropped or s.collage) for s in scenes]
    read = metric_models.attributes(images)
    for name in evaluators.ATTRIBUTES:
        shown = [evaluators.visible(thing, name) for thing in things]
        right = [found[name] == getattr(thing, name) for found, thing in zip(read, things, strict=True)]
        everywhere = [r for r, s in zip(right, shown, strict=True) if s]
        photos = [r for r, s, w in zip(right, shown, whole, strict=True) if s and w]
        print(f"probe {name:13} photos {_mean(photos):.3f}  all pictures {_mean(everywhere):.3f}")


def _mean(values) -> float:
    return sum(values) / len(values)


def _retrieval(metric_models, images, things):
    """Rows come as block, member (Au, Av, Bu, Bv), view (2)."""
    features = metrics.features(metric_models.encoder.image_features, images)
    number = torch.arange(len(images))
    subject = torch.tensor([world.SUBJECTS.index(thing.subject) for thing in things])
    same_class = subject[:, None] == subject[None]
    parts = {
        "identity": features,
        "named": metric_models.heads.named(features),
        "unnamed": metric_models.heads.unnamed(features),
    }
    for name, vectors in parts.items():
        unit = torch.nn.functional.normalize(vectors.detach(), dim=-1)
        cosine = unit @ unit.T
        rivals = cosine.masked_fill(~same_class, -9).fill_diagonal_(-9)
        top = (rivals.argmax(1) == (number ^ 1)).float().mean()
        own = cosine[number, number ^ 1]
        fellow, cousin = cosine[number, number ^ 2], cosine[number, number ^ 4]
        other = cosine[same_class & (number[:, None] // 8 != number[None] // 8)]
        above = (own[:, None] > other[torch.randperm(len(other))[:4000]][None]).float().mean()
        first, second = ((own > rival).float().mean() for rival in (fellow, cousin))
        print(
            f"{name:9} same-class retrieval {top:.3f}  AUC {above:.3f}  cosine: same {own.mean():.3f}, "
            f"other {other.mean():.3f}, only nameable shared {fellow.mean():.3f}, only never-named shared "
            f"{cousin.mean():.3f}; same above only nameable {first:.3f}, above only never-named {second:.3f}"
        )


def _captions(metric_models, images, things, scenes):
    wordings = {
        "subject": (world.SUBJECTS, lambda t, s, x: f"a photo of a {x}", lambda t, s: t.subject),
        "colour": (
            tuple(world.COLOURS),
            lambda t, s, x: f"a photo of a {x} {t.subject} {s.background}",
            lambda t, s: t.colour,
        ),
        "pattern": (
            world.PATTERNS,
            lambda t, s, x: f"a photo of a {x} {t.subject} {s.background}",
            lambda t, s: t.pattern,
        ),
        "background": (
            tuple(world.BACKGROUNDS),
            lambda t, s, x: f"a photo of a {t.subject} {x}",
            lambda t, s: s.background,
        ),
        "style": (world.STYLES, lambda t, s, x: f"a {x} of a {t.subject} {s.background}", lambda t, s: s.style),
        "extra": (
            tuple(f"{c} {e}" for c in world.COLOURS for e in world.EXTRAS[1:]),
            lambda t, s, x: f"a photo of a {t.colour} {t.subject} with a {x} {s.background}",
            lambda t, s: f"{t.extra_colour} {t.extra}",
        ),
    }
    chosen = [i for i, s in enumerate(scenes) if not (s.collage or s.cropped)][:400]
    pictures = metrics.unit_features(metric_models.clip.image_features, [images[i] for i in chosen])
    for name, (answers, wording, truth) in wordings.items():
        right = []
        for picture, i in zip(pictures, chosen, strict=True):
            if name == "extra" and things[i].extra == "none":
                continue
            texts = [wording(things[i], scenes[i], answer).replace(" a o", " an o") for answer in answers]
            best = int((metrics.unit_features(metric_models.clip.text_features, texts) @ picture).argmax())
            right.append(answers[best] == truth(things[i], scenes[i]))
        print(f"clip zero-shot {name:10} {_mean(right):.3f} (chance {1 / len(answers):.2f})")
    _matching(metric_models, pictures, [things[i] for i in chosen], [scenes[i] for i in chosen])


def _matching(metric_models, pictures, things, scenes):
    texts = []
    for thing, where in zip(things, scenes, strict=True):
        texts.append(f"a {where.style} of {captions.describe(thing)} {where.background}")
    cosine = pictures @ metrics.unit_features(metric_models.clip.text_features, texts).T
    own = cosine.diagonal()
    top = _mean([cosine[i, i] >= cosine[i].max() for i in range(len(texts))])
    other = (cosine.sum() - own.sum()) / (len(texts) ** 2 - len(texts))
    print(f"clip full captions: retrieval {top:.3f} of {len(texts)}; cosine own {own.mean():.3f}, other {other:.3f}")
