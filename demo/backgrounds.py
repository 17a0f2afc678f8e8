"""The eight backgrounds of the demo world: textured by dithering whole tiles, never by blurring.

Each function takes a random.Random and gives uint8-range colours as float32 [16, 16, 3]. No subject is drawn here.
"""

import numpy as np

TILES = 16


def _dice(rng):
    """A numpy generator that the given random.Random decides."""
    return np.random.default_rng(rng.getrandbits(48))


def _dither(dice, colours, shares):
    """Every tile gets one of the colours at random, with the given shares."""
    index = dice.choice(len(colours), (TILES, TILES), p=shares)
    return np.array(colours, "float32")[index]


def _rows(picture, start, other):
    """Replaces the rows from start (one number, or one per column) downwards."""
    below = np.arange(TILES)[:, None] >= np.broadcast_to(np.asarray(start), (TILES,))[None]
    return np.where(below[..., None], other, picture)


def _cloud(picture, rng, colour, lowest):
    x, y = rng.randrange(0, 12), rng.randrange(0, lowest)
    picture[y, x + 1 : x + 3] = colour
    picture[y + 1, x : x + 4] = colour


def _grass(rng):
    dice, horizon = _dice(rng), rng.randint(5, 7)
    sky = _dither(dice, [(142, 204, 248), (152, 210, 250)], (0.85, 0.15))
    _cloud(sky, rng, (236, 246, 254), 3)
    return _rows(sky, horizon, _dither(dice, [(92, 178, 70), (76, 158, 60), (122, 200, 88)], (0.62, 0.25, 0.13)))


def _snow(rng):
    dice, horizon = _dice(rng), rng.randint(5, 7)
    sky = _dither(dice, [(168, 184, 208), (250, 252, 255)], (0.93, 0.07))
    hills = horizon + np.round(np.sin(np.arange(TILES) * 0.6 + rng.uniform(0, 6))).astype(int)
    return _rows(sky, hills, _dither(dice, [(228, 238, 248), (208, 222, 240)], (0.88, 0.12)))


def _beach(rng):
    dice, horizon = _dice(rng), rng.randint(4, 5)
    sky = _dither(dice, [(120, 206, 250), (132, 212, 252)], (0.85, 0.15))
    sea = _dither(dice, [(30, 140, 196), (70, 172, 214)], (0.8, 0.2))
    sand = _dither(dice, [(240, 216, 152), (228, 198, 130), (250, 230, 176)], (0.74, 0.16, 0.1))
    return _rows(_rows(sky, horizon, sea), horizon + rng.randint(3, 4), sand)


def _night(rng):
    dice, ground = _dice(rng), rng.randint(11, 12)
    sky = _dither(dice, [(30, 34, 88), (36, 42, 100), (250, 246, 190)], (0.8, 0.15, 0.05))
    x, y = rng.choice([1, 2, 3, 11, 12, 13]), rng.randint(0, 2)
    sky[y : y + 2, x : x + 2] = (252, 244, 180)
    return _rows(sky, ground, _dither(dice, [(44, 62, 60), (38, 52, 54)], (0.7, 0.3)))


def _wood(rng):
    dice, phase = _dice(rng), rng.randrange(4)
    planks = _dither(dice, [(178, 120, 70), (166, 108, 60), (190, 132, 80)], (0.7, 0.18, 0.12))
    rows = np.arange(TILES) % 4 == phase
    planks[rows] = (112, 68, 38)
    for row in range(TILES):
        if not rows[row]:
            planks[row, ((row - phase) // 4 * 7 + phase * 3) % TILES] = (112, 68, 38)
    return planks


def _fabric(rng):
    dice, phase = _dice(rng), rng.randrange(4)
    cloth = _dither(dice, [(248, 178, 208), (244, 168, 200)], (0.8, 0.2))
    y, x = np.mgrid[:TILES, :TILES]
    cloth[((x + y + phase) % 4 == 0) & ((x - y + phase) % 4 == 0)] = (226, 132, 174)
    cloth[((x + y + phase) % 4 == 2) & ((x - y + phase) % 4 == 2)] = (255, 206, 226)
    return cloth


def _desert(rng):
    dice, horizon = _dice(rng), rng.randint(6, 8)
    sky = _dither(dice, [(255, 214, 138), (252, 200, 118)], (0.85, 0.15))
    x = rng.choice([1, 2, 12, 13])
    sky[1:3, x : x + 2] = (255, 246, 200)
    dunes = horizon + np.round(1.5 * np.sin(np.arange(TILES) * rng.uniform(0.35, 0.5) + rng.uniform(0, 6))).astype(int)
    return _rows(sky, dunes, _dither(dice, [(218, 142, 72), (204, 126, 58), (230, 160, 92)], (0.72, 0.15, 0.13)))


def _water(rng):
    dice, horizon = _dice(rng), rng.randint(3, 4)
    sky = _dither(dice, [(196, 230, 246), (206, 236, 250)], (0.8, 0.2))
    water = _dither(dice, [(40, 108, 190)], (1.0,))
    y, x = np.mgrid[:TILES, :TILES]
    phase = rng.randrange(4)
    water[(y % 2 == 0) & ((x + y // 2 * 2 + phase) % 4 == 0)] = (96, 164, 226)
    water[(y % 2 == 0) & ((x + y // 2 * 2 + phase) % 4 == 1)] = (70, 138, 210)
    return _rows(sky, horizon, water)


BACKGROUNDS = {
    "on grass": _grass,
    "in the snow": _snow,
    "on the beach": _beach,
    "at night": _night,
    "on a wooden floor": _wood,
    "on pink fabric": _fabric,
    "in the desert": _desert,
    "on water": _water,
}


def background(name: str, rng) -> np.ndarray:
    """Colours 0..255 as float32 [16, 16, 3]."""
    return BACKGROUNDS[name](rng)
