"""The eight subjects of the demo world as label maps: which part of the subject covers which tile.

This file knows shapes only: it gives every 8 px tile one label (body, second colour, eye ...) by majority over 6 x 6
sub-samples, so that edges stay crisp. Colours, patterns and backgrounds are world.py's and backgrounds.py's business.
Coordinates: x to the right, y down, the subject's feet at y = 1, its half height 1.
"""

import math

import numpy as np
from PIL import Image, ImageDraw

TILES = 16
SUB = 6
NONE, BODY, PLAIN, SECOND, EXTRA, DARK, PALE, GREY, WOOD, GLASS, EYE, NOSE, LAMP = range(13)
# Small features would lose every majority vote without a larger say.
VOTES = np.ones(13, "float32")
VOTES[[EYE, NOSE]] = 2.6
VOTES[[EXTRA, DARK, WOOD]] = 1.5
VOTES[[SECOND, GLASS, LAMP]] = 1.2


class Pen:
    """Draws label polygons at sub-tile resolution around a centre given in tiles."""

    def __init__(self, x: float, y: float, half: float, aspect: float):
        self.image = Image.new("L", (TILES * SUB, TILES * SUB), NONE)
        self.pencil = ImageDraw.Draw(self.image)
        self.centre = (x * SUB, y * SUB)
        self.scale = (half * SUB * math.sqrt(aspect), half * SUB / math.sqrt(aspect))

    def polygon(self, points, label: int):
        (cx, cy), (sx, sy) = self.centre, self.scale
        self.pencil.polygon([(cx + x * sx - 0.5, cy + y * sy - 0.5) for x, y in points], fill=label)

    def box(self, x0, y0, x1, y1, label: int):
        self.polygon([(x0, y0), (x1, y0), (x1, y1), (x0, y1)], label)

    def oval(self, x, y, rx, ry, label: int):
        turn = [2 * math.pi * i / 24 for i in range(24)]
        self.polygon([(x + rx * math.cos(t), y + ry * math.sin(t)) for t in turn], label)

    def labels(self) -> np.ndarray:
        """Majority label of each tile, [TILES, TILES]."""
        fine = np.asarray(self.image).reshape(TILES, SUB, TILES, SUB)
        votes = np.stack([(fine == k).sum((1, 3)) for k in range(len(VOTES))], -1) * VOTES
        return votes.argmax(-1)


def _dog(pen, k1, k2):
    pen.polygon([(-0.5, 0.2), (-0.72, -0.5 - 0.2 * k2), (-0.95, -0.5 - 0.2 * k2), (-0.75, 0.25)], SECOND)
    pen.box(-0.72, -0.02, 0.5, 0.56, BODY)
    pen.box(-0.7, 0.5, -0.46, 1, PLAIN)
    pen.box(0.24, 0.5, 0.48, 1, PLAIN)
    pen.box(-0.7, 0.8, -0.46, 1, SECOND)
    pen.box(0.24, 0.8, 0.48, 1, SECOND)
    pen.box(0.18, -0.72, 0.82, 0.02, PLAIN)
    pen.box(0.78, -0.36, 1.16, 0.0, PLAIN)
    pen.box(0.98, -0.4, 1.18, -0.2, DARK)
    pen.box(0.1, -0.74, 0.4, -0.3 + 0.36 * k1, SECOND)
    pen.box(0.56, -0.52, 0.74, -0.34, EYE)
    return 0.5, -0.72


def _cat(pen, k1, k2):
    pen.polygon(
        [(0.2, 0.98), (0.86, 0.98), (0.98, -0.1 - 0.3 * k2), (0.74, -0.1 - 0.3 * k2), (0.68, 0.7), (0.2, 0.72)], SECOND
    )
    pen.oval(0, 0.5, 0.42 + 0.14 * k1, 0.54, BODY)
    pen.polygon([(-0.56, -0.3), (-0.54, -1.02), (-0.08, -0.62)], SECOND)
    pen.polygon([(0.56, -0.3), (0.54, -1.02), (0.08, -0.62)], SECOND)
    pen.oval(0, -0.28, 0.56, 0.42, PLAIN)
    pen.box(-0.36, -0.42, -0.18, -0.22, EYE)
    pen.box(0.18, -0.42, 0.36, -0.22, EYE)
    pen.box(-0.09, -0.18, 0.09, -0.02, NOSE)
    return 0, -0.74


def _robot(pen, k1, k2):
    head, body = 0.42 + 0.14 * k1, 0.4 + 0.16 * k2
    pen.box(-0.42, 0.5, -0.1, 1, GREY)
    pen.box(0.1, 0.5, 0.42, 1, GREY)
    pen.box(-body - 0.36, -0.06, -body, 0.14, SECOND)
    pen.box(-body - 0.36, -0.06, -body - 0.16, 0.62, SECOND)
    pen.box(body, -0.06, body + 0.36, 0.14, SECOND)
    pen.box(body + 0.16, -0.5, body + 0.36, 0.14, SECOND)
    pen.box(-body, -0.12, body, 0.66, BODY)
    pen.box(-head - 0.18, -0.6, head + 0.18, -0.38, GREY)
    pen.box(-head, -0.84, head, -0.1, PLAIN)
    pen.box(-0.34, -0.66, -0.16, -0.46, LAMP)
    pen.box(0.16, -0.66, 0.34, -0.46, LAMP)
    pen.box(-0.28, -0.36, 0.28, -0.2, DARK)
    return 0, -0.84


def _car(pen, k1, k2):
    top, wheel = 0.5 + 0.2 * k1, 0.25 + 0.08 * k2
    pen.polygon([(-0.72, 0.05), (-0.46, -top), (0.3, -top), (0.66, 0.05)], SECOND)
    pen.polygon([(-0.48, 0.0), (-0.32, -top + 0.18), (-0.08, -top + 0.18), (-0.08, 0.0)], GLASS)
    pen.polygon([(0.08, 0.0), (0.08, -top + 0.18), (0.22, -top + 0.18), (0.44, 0.0)], GLASS)
    pen.polygon([(-1, 0.02), (0.85, 0.02), (1, 0.2), (1, 0.44), (-1, 0.44)], BODY)
    pen.box(-1, 0.4, 1, 0.6, PLAIN)
    for x in (-0.55, 0.55):
        pen.oval(x, 0.64, wheel + 0.04, wheel, DARK)
        pen.box(x - 0.1, 0.55, x + 0.1, 0.74, GREY)
    pen.box(0.84, 0.16, 1.0, 0.34, LAMP)
    return -0.06, -top


def _house(pen, k1, k2):
    roof = 0.62 + 0.28 * k1
    pen.box(0.36, -0.15 - roof * 0.9, 0.6, -0.2, WOOD)
    pen.box(-0.72, -0.15, 0.72, 0.84, BODY)
    pen.box(-0.8, 0.8, 0.8, 1, PLAIN)
    pen.polygon([(-1, -0.08), (-0.12, -0.15 - roof), (0.12, -0.15 - roof), (1, -0.08)], SECOND)
    pen.box(-0.5, 0.36, -0.12, 1, DARK if k2 < 0.5 else WOOD)
    pen.box(0.16, 0.14, 0.52, 0.5, LAMP)
    return 0, -0.15 - roof


def _boat(pen, k1, k2):
    pen.box(-0.09, -1.0, 0.09, 0.3, WOOD)
    pen.polygon([(0.12, -0.96), (0.12, 0.2), (0.56 + 0.32 * k1, 0.2)], SECOND)
    pen.polygon([(-0.12, -0.7), (-0.12, 0.2), (-0.5 - 0.24 * k2, 0.2)], PALE)
    pen.polygon([(-1, 0.3), (1, 0.3), (0.66, 1), (-0.66, 1)], BODY)
    pen.polygon([(-1.04, 0.28), (1.04, 0.28), (0.94, 0.5), (-0.94, 0.5)], PLAIN)
    return 0, -0.98


def _cup(pen, k1, k2):
    foot = 0.34 + 0.22 * k1
    pen.oval(0.56, 0.1, 0.42, 0.42, SECOND)
    pen.oval(0.54, 0.1, 0.16 + 0.06 * k2, 0.2, NONE)
    pen.polygon([(-0.68, -0.6), (0.56, -0.6), (foot, 0.92), (-foot - 0.12, 0.92)], BODY)
    pen.box(-0.7, -0.66, 0.58, -0.3, PLAIN)
    pen.box(-0.52, -0.68, 0.4, -0.48, WOOD if k2 < 0.5 else PALE)
    return -0.06, -0.68


def _fish(pen, k1, k2):
    belly, tail = 0.46 + 0.18 * k1, 0.42 + 0.2 * k2
    pen.polygon([(-0.42, 0), (-1.05, -tail), (-1.05, tail)], SECOND)
    pen.polygon([(-0.25, -belly * 0.7), (-0.05, -belly - 0.3), (0.35, -belly * 0.8)], SECOND)
    pen.polygon([(-0.1, belly * 0.8), (-0.2, belly + 0.26), (0.25, belly * 0.8)], SECOND)
    pen.oval(0.15, 0, 0.78, belly, PLAIN)
    pen.oval(0.02, 0, 0.52, belly * 0.92, BODY)
    pen.box(0.42, -0.26, 0.62, -0.06, EYE)
    pen.box(0.72, 0.08, 0.94, 0.22, DARK)
    return 0.1, -belly - 0.12


SUBJECTS = {
    "dog": _dog,
    "cat": _cat,
    "robot": _robot,
    "car": _car,
    "house": _house,
    "boat": _boat,
    "cup": _cup,
    "fish": _fish,
}


def _add_extra(pen, kind: str, x: float, y: float):
    """The accessory stands on the point (x, y), the top of the subject."""
    if kind == "hat":
        pen.box(x - 0.42, y - 0.12, x + 0.42, y + 0.08, EXTRA)
        pen.box(x - 0.24, y - 0.48, x + 0.24, y - 0.1, EXTRA)
    elif kind == "flag":
        pen.box(x - 0.1, y - 0.52, x + 0.08, y + 0.08, DARK)
        pen.box(x + 0.08, y - 0.52, x + 0.62, y - 0.14, EXTRA)
    elif kind == "ball":
        pen.box(x - 0.19, y - 0.36, x + 0.19, y + 0.02, EXTRA)
    elif kind == "star":
        pen.box(x - 0.1, y - 0.54, x + 0.1, y + 0.04, EXTRA)
        pen.box(x - 0.29, y - 0.36, x + 0.29, y - 0.16, EXTRA)


def label_map(subject: str, extra: str, shape: tuple, x: float, y: float, half: float) -> np.ndarray:
    """Labels of the tiles, [TILES, TILES], for a subject centred at tile (x, y); shape = (aspect, k1, k2)."""
    pen = Pen(x, y, half, shape[0])
    top = SUBJECTS[subject](pen, shape[1], shape[2])
    _add_extra(pen, extra, *top)
    return pen.labels()
