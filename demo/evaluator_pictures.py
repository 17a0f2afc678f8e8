"""Images that teach the evaluators what an identity is: four individuals of one class share details crosswise.

Such a block crosses two sets of nameable details (colour, pattern, accessory and its colour) with two sets of
never-named ones (second colour and its shade, proportions, pattern period). So "same nameable details, other
individual" and the reverse are both at hand as hard negatives. Individuals come from the evaluators' seed range; this
file trains nothing.
"""

import random
from dataclasses import replace

import numpy as np

from .world import COLOURS, EVALUATOR_SEEDS, TILES, Instance, draw, sample_instance, sample_scene

VIEWS = 4
MEMBERS = 4


def _shade(name: str, rng) -> tuple:
    return tuple(min(255, max(0, value + rng.randint(-16, 16))) for value in COLOURS[name])


def _repaint(thing: Instance, colours: tuple, rng) -> Instance:
    colour, extra = colours
    return replace(thing, colour=colour, rgb=_shade(colour, rng), extra_colour=extra, extra_rgb=_shade(extra, rng))


def block(index: int) -> list[Instance]:
    """Individuals Au, Av, Bu, Bv: A and B are nameable details, u and v never-named ones. Exact shades of the body
    are all different.
    """
    rng = random.Random(f"block {EVALUATOR_SEEDS[index]}")
    u = sample_instance(rng)
    v = sample_instance(rng, u.subject)
    if (
        rng.random() < 0.3
    ):  # the same name of the second colour: then only its shade, the proportions and the period tell them apart
        v = replace(v, second=u.second, second_rgb=_shade(u.second, rng))
    names = [name for name in COLOURS if name not in (u.second, v.second)]
    a, b = (_repaint(sample_instance(rng, u.subject), rng.sample(names, 2), rng) for _ in range(2))
    return [_combine(named, unnamed, rng) for named in (a, b) for unnamed in (u, v)]


def _combine(named: Instance, unnamed: Instance, rng) -> Instance:
    fields = ("second", "second_rgb", "shape", "period")
    thing = replace(named, **{name: getattr(unnamed, name) for name in fields})
    return replace(thing, rgb=_shade(thing.colour, rng))


def scene(index: int, member: int, view: int):
    """A scene and the generator that goes on to draw it. No grayscale: it hides what an identity is."""
    rng = random.Random(f"view {EVALUATOR_SEEDS[index]} {member} {view}")
    return replace(sample_scene(rng), gray=False), rng


def pictures(indices) -> np.ndarray:
    """Tile colours of whole blocks, uint8 [blocks, MEMBERS, VIEWS, 16, 16, 3]."""
    out = np.zeros((len(indices), MEMBERS, VIEWS, TILES, TILES, 3), "uint8")
    for row, index in enumerate(indices):
        for member, thing in enumerate(block(index)):
            for view in range(VIEWS):
                out[row, member, view] = draw(thing, *scene(index, member, view))
    return out
