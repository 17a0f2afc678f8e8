"""Draws icon.png, the pack's image in lists of packs: the demo's dog, and the star that it learns.

    python -m demo.icon

400 x 400 px, the largest that such lists take: 16 x 16 tiles, as every image of the demo's world.
"""

from pathlib import Path

import numpy as np

from . import world

ICON = Path(__file__).resolve().parent.parent / "icon.png"
TILE = 25
PICTURE = """
................
..+.........S...
...........SSS..
......+...SSSSS.
...........SSS..
.....BB....S.S..
+...YYBBBB......
....YYBWBBBB....
....YYBKBBBKK...
.Y..YYBBBBBBB.+.
.YY..BBBBPP.....
..YBBBBBBB......
...BBYBBYB......
,,,BBBBBBB,,,,,,
,;,BB,,,BB,,;,,,
;;,YY;,,YY,;;,;;
"""
COLOURS = {
    "+": (190, 176, 232),
    "S": (255, 226, 110),
    "B": (74, 122, 240),
    "Y": (255, 190, 60),
    "W": (255, 255, 255),
    "K": (24, 20, 48),
    "P": (246, 130, 150),
    ",": (46, 132, 96),
    ";": (36, 108, 82),
}
NIGHT, DUSK = np.array((34, 28, 78)), np.array((112, 84, 178))


def tiles() -> np.ndarray:
    """Tile colours, uint8 [16, 16, 3]; the sky brightens downwards."""
    rows = PICTURE.split()
    share = [row / len(rows) for row in range(len(rows))]
    sky = [NIGHT * (1 - part) + DUSK * part for part in share]
    return np.array([[COLOURS.get(letter, sky[i]) for letter in row] for i, row in enumerate(rows)]).astype("uint8")


if __name__ == "__main__":
    world.picture(tiles(), TILE).quantize(64).save(ICON, optimize=True)
