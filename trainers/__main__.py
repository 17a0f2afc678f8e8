"""Trainings and evaluations without ComfyUI, on one device or several.

    python -m trainers RUN/run.json --checkpoint FILE --out DIR          repeat a run of the graph
    python -m trainers textboost --images DIR --class-word dog --checkpoint FILE --out DIR [--set steps=100 ...]
    torchrun --nproc-per-node 2 -m trainers ...                          the same on two cards (or accelerate launch)
    python -m trainers evaluate RUN --checkpoint FILE --out DIR          draw prompts with what a run learned, and score
    python -m trainers dreambench --data DIR --checkpoint FILE --out DIR the DreamBooth protocol, all its subjects
    python -m trainers evaluate --help                                   the flags of these two, which are their own

A run's folder, DIR/<digest>, is that of the graph: what is complete is not trained again, what was broken off goes on.
"""

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from .cli import evaluate
from .cli.dreambench import command as dreambench
from .cli.options import (
    method_flags,
    model_flags,
    new_parser,
    settings_help,
    starting_from,
    train_command,
    training_flags,
    word_flags,
)
from .cli.train import NAMES, asked_for
from .device import SingleDevice
from .runs import pick
from .runs.folder import RunFolder
from .runs.preview import Preview
from .runs.result import RunResult
from .runs.run import extractor_configs
from .runs.shared_folder import SharedFolder
from .training.distributed import ManyDevices, launched, processes

COMMANDS = {"evaluate": evaluate.main, "dreambench": dreambench.main}


def main(arguments: Sequence[str] | None = None) -> None:
    arguments = sys.argv[1:] if arguments is None else [*arguments]
    try:
        if command := COMMANDS.get(arguments[0] if arguments else ""):
            command(arguments[1:])
        else:
            run(parser().parse_args(arguments))
    except KeyboardInterrupt:
        sys.exit("broken off: the same command goes on from the last checkpoint")
    except (ValueError, OSError, RuntimeError, MemoryError, ArithmeticError) as error:
        sys.exit(f"error: {error}")


def parser() -> argparse.ArgumentParser:
    """Flags for what is common to all methods; a method's own settings are listed below them."""
    command = new_parser("", __doc__, settings_help())
    command.add_argument(
        "what", metavar="RUN.JSON|METHOD|evaluate|dreambench",
        help=f"a run's run.json; one of {', '.join(NAMES)}; or one of the other two commands",
    )  # fmt: skip
    model_flags(command)
    command.add_argument("--out", type=Path, required=True, help="the folder that holds the folders of runs")
    training_flags(command)
    command.add_argument("--preview", action="append", default=[], metavar="PROMPT", help="drawn while training")
    command.add_argument("--preview-every", type=int, default=50, metavar="N", help="in steps")
    method = command.add_argument_group("where METHOD is given")
    method.add_argument("--images", type=Path, metavar="DIR", help="the pictures; a .txt beside one is its caption")
    method.add_argument("--class-images", type=Path, metavar="DIR", help="pictures for prior preservation")
    method_flags(method)
    word_flags(method)
    return command


def run(given: argparse.Namespace) -> RunResult:
    """Train what the command line asks for, or find it trained."""
    device = torch.device(given.device)
    if not launched():
        return _run(given, device, SingleDevice, RunFolder, say=print)
    with processes(device) as own:
        first = os.environ["RANK"] == "0"
        say = print if first else (lambda sentence: None)
        return _run(given, own, ManyDevices, SharedFolder, say=say, first=first)


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
        finished = pick.chosen(finished, asked.stopper)
        say(f"{finished.stop_reason}; it is complete and not trained again")
        return finished
    for choice in extractor_configs(asked.recipe, asked.stopper):
        models.extractors.load(choice)
    result = train_command(
        asked, models, folder, devices(device=device, dtype=asked.dtype), say,
        model=model,
        micro_batch_size=given.micro_batch_size,
        preview=Preview(prompts=tuple(given.preview) if first else (), every=given.preview_every),
        checkpoint_every=given.checkpoint_every,
        cache=given.out / "cache" if first else None,
    )  # fmt: skip
    result = pick.chosen(result, asked.stopper)
    say(f"run {folder.path.name}: {result.stop_reason}, {result.seconds / 60:.1f} minutes of training")
    return result


if __name__ == "__main__":
    main()
