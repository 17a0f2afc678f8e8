"""Trainings without ComfyUI, on one device or several.

    python -m trainers RUN/run.json --checkpoint FILE --out DIR          repeat a run of the graph
    python -m trainers textboost --images DIR --class-word dog --checkpoint FILE --out DIR [--set steps=100 ...]
    torchrun --nproc-per-node 2 -m trainers ...                          the same on two cards (or accelerate launch)

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

from . import distributed, repeat, training
from .asked import NAMES, WORDS, asked_for
from .backbones import Backbones
from .checkpoint import load_models
from .folder import RunFolder, RunResult
from .loop import SingleDevice
from .memory import Effort
from .models import Models
from .previews import Preview
from .repeat import CROPS
from .run import Run, fingerprint
from .watcher import Watcher

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
    for choice in asked.judges():
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


def starting_from(
    given: argparse.Namespace, asked: Run, about: dict, device: torch.device, say: Callable[[str], None]
) -> tuple[Models, str]:
    """The checkpoint's models and their fingerprint; the run's own, where they are what it started from."""
    layout = json.loads(given.layout.read_text(encoding="utf-8")) if given.layout else {}
    load = partial(load_models, given.checkpoint, layout.get("unet"), layout.get("heads"))
    models, same = repeat.starting_models(load, asked, about, device)
    rounding = repeat.autoencoder_difference(models, about)
    same = same and rounding < repeat.ROUNDING
    models.backbones = Backbones(folders=lambda: given.clip_folder)
    if about and asked.dataset() != about.get("dataset"):
        say("The pictures beside run.json are not exactly those of that run: the result will differ.")
    if about and not same:
        say(
            f"{given.checkpoint.name} on {device.type} is not what that run started from (other weights, a LoRA or a "
            "word learned earlier in the graph, CLIP skip, another VAE or another device): the result will differ."
        )
    elif rounding:
        say(f"The autoencoder rounds otherwise than in the graph (by {rounding:.0e}): so may the result.")
    return models, about["model"] if same else fingerprint(models)


if __name__ == "__main__":
    main()
