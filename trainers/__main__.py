"""Trainings without ComfyUI, on one device or several.

    python -m trainers RUN/run.json --checkpoint FILE --out DIR          repeat a run of the graph
    python -m trainers textboost --images DIR --class-word dog --checkpoint FILE --out DIR [--set steps=100 ...]
    accelerate launch --num_processes 2 -m trainers ...                  the same on two cards (or torchrun)

A run's folder, DIR/<digest>, is that of the graph: what is complete is not trained again, what was broken off goes on.
"""

import argparse
import dataclasses
import json
import os
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from PIL import Image, ImageOps

from . import distributed, repeat, training
from .backbones import Backbones
from .checkpoint import load_models
from .data import Concept, captions_of
from .folder import RunFolder, RunResult
from .kept import pixels
from .loop import SingleDevice
from .memory import Effort
from .models import Models
from .previews import Preview
from .recipes import METHODS
from .repeat import CROPS
from .run import NOT_WORDS, Run, fingerprint
from .sentences import quoted, reason
from .settings import changed
from .watcher import Watcher

NAMES = {name.lower().replace(" ", "-"): presets for name, presets in METHODS.items()}
WORDS = [f for f in dataclasses.fields(Concept) if f.name not in NOT_WORDS and isinstance(f.default, (str, int))]
PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
OFFER = "bfloat16 where the card has it, else float16 on a card, else float32"


def main(arguments: Sequence[str] | None = None) -> None:
    given = parser().parse_args(arguments)
    try:
        run(given)
    except (ValueError, OSError, RuntimeError, MemoryError, ArithmeticError) as error:
        sys.exit(f"error: {error}")


def parser() -> argparse.ArgumentParser:
    """Flags for what is common to all methods; a method's own settings are listed below them."""
    command = argparse.ArgumentParser(
        prog="python -m trainers", description=__doc__, epilog=settings_help(), allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    command.add_argument("what", metavar="RUN.JSON|METHOD", help=f"a run's run.json, or one of {', '.join(NAMES)}")
    command.add_argument("--checkpoint", type=Path, required=True, help="a .safetensors file of SD 1.x, SD 2.x or SDXL")
    command.add_argument("--out", type=Path, required=True, help="the folder that holds the folders of runs")
    command.add_argument("--layout", type=Path, help='of a model in other sizes: a JSON of {"unet": {...}, "heads": n}')
    command.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    command.add_argument("--micro-batch-size", type=int, default=0, metavar="N", help="pictures at once; 0: as fit")
    command.add_argument("--checkpoint-every", type=int, default=50, metavar="N", help="in steps")
    command.add_argument("--clip-folder", type=Path, default=[], action="append", help="holds CLIPs that judge")
    command.add_argument("--preview", action="append", default=[], metavar="PROMPT", help="drawn while training")
    command.add_argument("--preview-every", type=int, default=50, metavar="N", help="in steps")
    method = command.add_argument_group("where METHOD is given")
    method.add_argument("--preset", help="of the method; by default its first")
    method.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="a setting, see below")
    method.add_argument("--images", type=Path, metavar="DIR", help="the pictures; a .txt beside one is its caption")
    method.add_argument("--class-images", type=Path, metavar="DIR", help="pictures for prior preservation")
    for word in WORDS:
        method.add_argument(
            f"--{word.name.replace('_', '-')}", type=type(word.default), default=word.default,
            choices=CROPS if word.name == "crop" else None,
        )  # fmt: skip
    method.add_argument("--stopper", default="[]", metavar="JSON", help='[{"monitor": "DVAR", "window": 80}]')
    method.add_argument("--seed", type=int, default=0)
    method.add_argument("--precision", choices=["auto", *repeat.PRECISIONS], default="auto", help=OFFER)
    return command


def settings_help() -> str:
    """Every setting of every method, from its dataclass."""
    lines = []
    for name, presets in NAMES.items():
        lines.append(f"\nsettings of {name} (presets: {', '.join(presets)}):")
        found = {f.name: f for preset in presets.values() for f in dataclasses.fields(preset)}
        lines += [f"  {f.name}={_shown(f.default)}  {f.metadata['help']}" for f in found.values()]
    return "\n".join(lines)


def _shown(default: object) -> str:
    return "FILE" if default == () else str(default)


def run(given: argparse.Namespace) -> RunResult:
    """Train what the command line asks for, or find it trained."""
    device = torch.device(given.device)
    if not distributed.launched():
        return _run(given, device, SingleDevice, RunFolder, say=print)
    with distributed.processes(device) as own:
        first = os.environ["RANK"] == "0"
        say = print if first else (lambda sentence: None)
        return _run(given, own, distributed.ManyDevices, distributed.SharedFolder, say=say, first=first)


def _run(
    given: argparse.Namespace, device: torch.device, devices: type[SingleDevice], folders: type[RunFolder],
    say: Callable[[str], None], first: bool = True,
) -> RunResult:  # fmt: skip
    asked, about = asked_for(given, device)
    models, model = starting_from(given, asked, about, device, say)
    asked.recipe.check(asked.concept)
    folder = folders(given.out / asked.digest(model))
    say(f"run {folder.path.name}")
    if finished := folder.result():
        say(f"{finished.stop_reason}; it is complete and not trained again")
        return finished
    for part in (asked.recipe, *asked.stopper):
        if choice := getattr(part, "clip", None):
            models.backbones.load(choice)
    result = training.train(
        asked, models, folder,
        model=model,
        device=devices(device=device, dtype=asked.dtype),
        effort=Effort(micro_batch_size=given.micro_batch_size),
        free_memory=(lambda: torch.cuda.mem_get_info(device)[0]) if device.type == "cuda" else None,
        preview=Preview(prompts=tuple(given.preview) if first else (), every=given.preview_every),
        checkpoint_every=given.checkpoint_every,
        watcher=Watcher(on_entry=partial(progress, say, asked.recipe.steps), on_notice=say),
        cache=given.out / "cache" if first else None,
    )  # fmt: skip
    say(f"run {folder.path.name}: {result.stop_reason}, {result.seconds / 60:.1f} minutes of training")
    return result


def progress(say: Callable[[str], None], steps: int, entry: dict) -> None:
    if entry["step"] == 1 or entry["step"] % 10 == 0:
        say(f"{entry['stage']}: step {entry['step']} of {steps}, loss {entry['loss']:.4f}")


def asked_for(given: argparse.Namespace, device: torch.device) -> tuple[Run, dict]:
    """The run, and run.json where one was given."""
    if given.what not in NAMES:
        if not given.what.endswith(".json"):
            raise ValueError(
                f"There is no method {quoted(given.what)}: write one of {', '.join(NAMES)}, or a run.json."
            )
        return repeat.read(Path(given.what))
    if given.images is None:
        raise ValueError("There is no picture to learn from: name a folder of pictures with --images.")
    images, captions = pictures_in(given.images)
    others, beside = pictures_in(given.class_images) if given.class_images else ((), ())
    pictures = {"images": images, "captions": captions, "class_images": others, "class_captions": beside}
    concept = Concept(**pictures, **{word.name: getattr(given, word.name) for word in WORDS})
    return Run(
        concept=concept,
        recipe=recipe_of(given),
        stopper=repeat.monitors(json.loads(given.stopper)),
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
        return repeat.PRECISIONS[name]
    if device.type != "cuda":
        return torch.float32
    return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16


def pictures_in(folder: Path) -> tuple[tuple[torch.Tensor, ...], tuple[str, ...]]:
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


def starting_from(
    given: argparse.Namespace, asked: Run, about: dict, device: torch.device, say: Callable[[str], None]
) -> tuple[Models, str]:
    """The checkpoint's models and their fingerprint; the run's own, where they are what it started from."""
    layout = json.loads(given.layout.read_text(encoding="utf-8")) if given.layout else {}
    load = partial(load_models, given.checkpoint, layout.get("unet"), layout.get("heads"))
    models, same = repeat.starting_models(load, asked, about, device)
    models.backbones = Backbones(folders=lambda: given.clip_folder)
    if about and asked.dataset() != about.get("dataset"):
        say("The pictures beside run.json are not exactly those of that run: the result will differ.")
    if about and not same:
        say(
            f"{given.checkpoint.name} on {device.type} is not what that run started from (other weights, a LoRA or a "
            "word learned earlier in the graph, CLIP skip, or another device): the result will differ."
        )
    return models, about["model"] if same else fingerprint(models)


if __name__ == "__main__":
    main()
