"""What a command line asks for: a run of a run.json, or one of a method's name, pictures and settings."""

import argparse
import dataclasses
import json
from pathlib import Path

import torch
from PIL import Image, ImageOps

from ..data.concept import Concept
from ..recipes import METHODS
from ..runs import replay
from ..runs.run import NOT_WORDS, Run
from ..runs.saved_images import pixels
from ..settings import changed
from ..text import captions_of, quoted, reason

NAMES = {name.lower().replace(" ", "-"): presets for name, presets in METHODS.items()}
WORDS = [f for f in dataclasses.fields(Concept) if f.name not in NOT_WORDS and isinstance(f.default, (str, int))]
PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


def asked_for(given: argparse.Namespace, device: torch.device) -> tuple[Run, dict]:
    """The run, and run.json where one was given."""
    if given.what not in NAMES:
        if not given.what.endswith(".json"):
            raise ValueError(
                f"There is no method {quoted(given.what)}: write one of {', '.join(NAMES)}, or a run.json."
            )
        return replay.read(Path(given.what))
    if given.images is None:
        raise ValueError("There is no picture to learn from: name a folder of pictures with --images.")
    images, captions = images_in(given.images)
    others, beside = images_in(given.class_images) if given.class_images else ((), ())
    pictures = {"images": images, "captions": captions, "class_images": others, "class_captions": beside}
    concept = Concept(**pictures, **{word.name: getattr(given, word.name) for word in WORDS})
    return Run(
        concept=concept,
        recipe=recipe_of(given),
        stopper=replay.monitors(json.loads(given.stopper)),
        seed=given.seed,
        dtype=precision(given.precision, device),
    ), {}


def recipe_of(given: argparse.Namespace):
    """The preset with what `--set` changes."""
    presets = NAMES[given.what]
    preset = presets.get(given.preset or next(iter(presets)))
    if preset is None:
        raise ValueError(f"{given.what} has no preset {quoted(given.preset)}: use one of {', '.join(presets)}.")
    known = {f.name: f.default for f in dataclasses.fields(preset)}
    pairs = [text.partition("=")[::2] for text in given.set]
    return changed(preset, {name: value_of(known.get(name), text) for name, text in pairs})


def value_of(default: object, text: str) -> object:
    """What a setting of that default becomes; text that does not fit stays text, and is refused later."""
    if isinstance(default, tuple):
        return captions_of(Path(text).read_text(encoding="utf-8"))
    if isinstance(default, str):
        return text
    try:
        return json.loads(text.lower())
    except ValueError:
        return text


def precision(name: str, device: torch.device) -> torch.dtype:
    if name != "auto":
        return replay.PRECISIONS[name]
    if device.type != "cuda":
        return torch.float32
    return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16


def images_in(folder: Path) -> tuple[tuple[torch.Tensor, ...], tuple[str, ...]]:
    """The pictures of a folder by name, over white where they are transparent, and their captions, none if all are "".

    Raises:
        ValueError: there are none, or one cannot be read.
    """
    files = sorted(f for f in folder.glob("*") if f.suffix.lower() in PICTURES)
    if not files:
        raise ValueError(f"The folder {quoted(folder.name)} holds no pictures: put {', '.join(PICTURES)} files there.")
    captions = [" ".join(t.read_text(encoding="utf-8-sig").split()) if (t := f.with_suffix(".txt")).exists() else ""
                for f in files]  # fmt: skip
    return tuple(map(_picture, files)), tuple(captions) if any(captions) else ()


def _picture(file: Path) -> torch.Tensor:
    try:
        with Image.open(file) as opened:
            image = ImageOps.exif_transpose(opened).convert("RGBA")
    except (OSError, SyntaxError, ValueError) as error:
        raise ValueError(f"The picture {quoted(file.name)} cannot be read ({reason(error)}): replace it.") from error
    white = Image.new("RGBA", image.size, "white")
    white.alpha_composite(image)
    return pixels(white.convert("RGB"))
