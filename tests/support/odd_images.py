"""Files that people put into a folder of references, written to be read: good ones, odd ones, broken ones. No test."""

import struct
import zlib
from pathlib import Path

import numpy as np
from PIL import Image

SIDE = 16
BLUE, HALF_RED = (0, 0, 255), (255, 0, 0, 128)


def png(path: Path, width: int, height: int, depth: int, color: int, row: bytes) -> None:
    """A PNG of equal rows, compressed row by row: also of sizes and depths that Pillow cannot write."""
    packer = zlib.compressobj(9)
    packed = b"".join(packer.compress(b"\0" + row) for _ in range(height)) + packer.flush()
    parts = [
        (b"IHDR", struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0)),
        (b"IDAT", packed),
        (b"IEND", b""),
    ]
    chunks = (struct.pack(">I", len(d)) + k + d + struct.pack(">I", zlib.crc32(k + d)) for k, d in parts)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(chunks))


def palette(transparent: bool) -> Image.Image:
    image = Image.new("P", (SIDE, SIDE), 1)
    image.putpalette([9, 9, 9, *BLUE])
    if transparent:
        image.paste(0, (0, 0, SIDE, SIDE))
        image.info["transparency"] = 0
    return image


def frames(path: Path, **options) -> None:
    """An animation whose first frame is blue."""
    first, *others = (Image.new("RGB", (SIDE, SIDE), color) for color in (BLUE, (255, 0, 0), (0, 255, 0)))
    first.save(path, save_all=True, append_images=others, duration=50, **options)


def turned(path: Path) -> None:
    """The camera was turned: upright it is twice as high as wide."""
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (2 * SIDE, SIDE), BLUE).save(path, exif=exif)


def _new(mode: str, color, **options):
    return lambda path: Image.new(mode, (SIDE, SIDE), color).save(path, **options)


# File name -> how it is written, and the colour that should be seen, 0..255.
GOOD = {
    "rgb.png": (_new("RGB", BLUE), BLUE),
    "transparent.png": (_new("RGBA", (0, 0, 0, 0)), (255, 255, 255)),
    "half.png": (_new("RGBA", HALF_RED), (255, 127, 127)),
    "gray.png": (_new("L", 100), (100, 100, 100)),
    "gray_alpha.png": (_new("LA", (0, 0)), (255, 255, 255)),
    "gray16.png": (lambda p: Image.fromarray(np.full((SIDE, SIDE), 100 * 257, np.uint16)).save(p), (100, 100, 100)),
    "gray16.tif": (lambda p: Image.fromarray(np.full((SIDE, SIDE), 100 * 257, np.uint16)).save(p), (100, 100, 100)),
    "rgb16.png": (lambda p: png(p, SIDE, SIDE, 16, 2, struct.pack(">HHH", 0, 0, 65535) * SIDE), BLUE),
    "one_bit.png": (_new("1", 1), (255, 255, 255)),
    "palette.png": (lambda p: palette(False).save(p), BLUE),
    "palette_transparent.png": (lambda p: palette(True).save(p, transparency=0), (255, 255, 255)),
    "animated.png": (lambda p: frames(p), BLUE),
    "animated.webp": (lambda p: frames(p, lossless=True), BLUE),
    "cmyk.jpg": (_new("CMYK", (255, 255, 0, 0)), BLUE),
    "TURNED.JPG": (turned, BLUE),
    "panorama.png": (lambda p: png(p, 20_000, 16, 8, 0, b"\x64" * 20_000), (100, 100, 100)),
}

# Folder -> what is in it, none of which can be learned from.
BAD = {
    "empty": {},
    "text": {"words.png": lambda p: p.write_text("no picture")},
    "cut": {"cut.png": lambda p: _cut(p)},
    "pixel": {"pixel.png": lambda p: Image.new("RGB", (1, 1)).save(p)},
    "bomb": {"bomb.png": lambda p: png(p, 20_000, 20_000, 1, 0, b"\0" * 2500)},
    "large": {"large.png": lambda p: png(p, 12_000, 10_000, 1, 0, b"\0" * 1500)},
    "float": {"float.tif": lambda p: Image.new("F", (SIDE, SIDE), 0.5).save(p)},
    "gif": {"only.gif": lambda p: frames(p)},
    "folders": {"folder.png": lambda p: p.mkdir()},
}


def _cut(path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path)
    path.write_bytes(path.read_bytes()[:2000])


def write(root: Path) -> None:
    """One folder per entry of BAD, and `good` with every file of GOOD."""
    for folder, files in {**BAD, "good": {name: make for name, (make, _) in GOOD.items()}}.items():
        (root / folder).mkdir(parents=True)
        for name, make in files.items():
            make(root / folder / name)
