"""`python -m trainers train` and `rerun`: one training from the command line, by a method's name or from a run.json.

A run's folder is DIR/<digest>, as in the graph: what is complete is not trained again, what was interrupted resumes.
"""

import argparse
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from ..device import SingleDevice, training_dtype
from ..models.fingerprint import fingerprint
from ..runs import pick, replay
from ..runs.folder import RunFolder
from ..runs.preview import Preview
from ..runs.result import RunResult
from ..runs.run import Run, extractor_configs, start_of
from ..runs.shared_folder import SharedFolder
from ..training.distributed import ManyDevices, launched, processes
from . import concepts, wandb_log
from .options import (
    METHOD_NAMES,
    WORDS,
    Say,
    extractor_cache,
    loader,
    method_flags,
    model_flags,
    new_parser,
    recipe_of,
    settings_help,
    train_command,
    training_flags,
    word_flags,
)


def parser(method: str = "") -> argparse.ArgumentParser:
    """Return the flags of `train`.

    Args:
        method: the method whose settings the help lists; empty for all.
    """
    command = new_parser(" train", __doc__, settings_help([method] if method in METHOD_NAMES else METHOD_NAMES))
    command.add_argument("method", metavar="METHOD", choices=METHOD_NAMES, help=", ".join(METHOD_NAMES))
    command.add_argument(
        "--images", type=Path, required=True, metavar="DIR", help="the images; a .txt next to one is its caption"
    )
    command.add_argument("--class-images", type=Path, metavar="DIR", help="images for prior preservation")
    command.add_argument(
        "--concepts", type=Path, metavar="FILE",
        help="JSON of further subjects to learn in the same training, each with its own words: "
        '[{"images": DIR, "class_word": "cat", "placeholder_token": "<cat>"}, ...]; also class_images and '
        "initializer_token",
    )  # fmt: skip
    method_flags(command)
    word_flags(command)
    _run_flags(command)
    return command


def rerun_parser() -> argparse.ArgumentParser:
    """Return the flags of `rerun`."""
    command = new_parser(" rerun", __doc__)
    command.add_argument("run", type=Path, metavar="RUN", help="a run's folder, or its run.json")
    _run_flags(command)
    return command


def _run_flags(command: argparse.ArgumentParser) -> None:
    model_flags(command)
    command.add_argument("--out", type=Path, required=True, help="the folder that holds the folders of runs")
    training_flags(command)
    command.add_argument(
        "--preview",
        action="append",
        default=[],
        metavar="PROMPT",
        help="generate this prompt during training; may be repeated",
    )
    command.add_argument("--preview-every", type=int, default=50, metavar="N", help="steps between previews [50]")
    command.add_argument(
        "--wandb", metavar="PROJECT", help="also log every step to this project of Weights & Biases (pip install wandb)"
    )


def main(arguments: Sequence[str]) -> None:
    """Run `train`."""
    given = parser(arguments[0] if arguments else "").parse_args(arguments)
    run_training(given, run_of(given))


def rerun_main(arguments: Sequence[str]) -> None:
    """Run `rerun`."""
    given = rerun_parser().parse_args(arguments)
    run_training(given, replay.read(given.run if given.run.suffix == ".json" else given.run / "run.json"))


def run_of(given: argparse.Namespace, say: Say = print) -> Run:
    """Return the run that the flags of `train` describe.

    Args:
        say: told of files that are left out.

    Raises:
        ValueError: an image, a setting or a word cannot be used.
    """
    words = {word.name: getattr(given, word.name) for word in WORDS}
    concept = concepts.read(given.images, given.class_images, words, say)
    return Run(
        concept=concepts.joined_with(given.concepts, concept, say) if given.concepts else concept,
        recipe=recipe_of(given.method, given.preset, given.set),
        stopper=replay.monitors(json.loads(given.stopper)),
        seed=given.seed,
        dtype=training_dtype(given.precision, torch.device(given.device)),
    )


def run_training(given: argparse.Namespace, run: Run) -> RunResult:
    """Train in this process or as one of several that share it; a complete run is returned as it is."""
    device = torch.device(given.device)
    if not launched():
        return _run_training(given, run, device, SingleDevice, RunFolder, say=print)
    with processes(device) as own:
        first = os.environ["RANK"] == "0"
        say = print if first else (lambda sentence: None)
        return _run_training(given, run, own, ManyDevices, SharedFolder, say=say, first=first)


def _run_training(
    given: argparse.Namespace, run: Run, device: torch.device, devices: type[SingleDevice], folders: type[RunFolder],
    say: Callable[[str], None], first: bool = True,
) -> RunResult:  # fmt: skip
    run.recipe.check(run.concept)
    if given.wandb:
        wandb_log.check()
    models = loader(given)().to("cpu", run.dtype)
    extractors = extractor_cache(given)
    model = start_of(run.recipe, run.stopper, fingerprint(models), extractors)
    folder = folders(given.out / run.digest(model))
    say(f"run {folder.path.name}")
    if finished := folder.result():
        finished = pick.chosen(finished, run.stopper)
        say(f"{finished.stop_reason}; it is complete and not trained again")
        return finished
    for config in extractor_configs(run.recipe, run.stopper):
        extractors.load(config)
    wanted = given.wandb and first
    log = wandb_log.logger(given.wandb, folder.path.name, run.settings()) if wanted else lambda report: None
    result = train_command(
        run, models, folder, devices(device=device, dtype=run.dtype), say,
        model=model,
        micro_batch_size=given.micro_batch_size,
        preview=Preview(prompts=tuple(given.preview) if first else (), every=given.preview_every),
        checkpoint_every=given.checkpoint_every,
        cache=given.out / "cache" if first else None,
        extractors=extractors,
        log=log,
    )  # fmt: skip
    result = pick.chosen(result, run.stopper)
    say(f"run {folder.path.name}: {result.stop_reason}, {result.seconds / 60:.1f} minutes of training")
    return result
