"""What the commands of `python -m trainers` share: flags, each defined once, and the models of a checkpoint."""

import argparse
import dataclasses
import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch

from ..device import SingleDevice
from ..evaluation.protocol import Protocol
from ..evaluation.scorer import ScorerConfig
from ..metrics.extractor_cache import ExtractorCache
from ..models.checkpoint import load_models
from ..models.diffusion import Models
from ..models.fingerprint import fingerprint
from ..runs import replay
from ..runs.callbacks import Callbacks
from ..runs.folder import RunFolder
from ..runs.replay import CROPS
from ..runs.result import RunResult
from ..runs.run import Run
from ..runs.train import train
from ..settings import changed
from ..training.memory import MemoryPlan
from .train import NAMES, WORDS

OFFER = "bfloat16 where the card has it, else float16 on a card, else float32"
Say = Callable[[str], None]


def new_parser(prog: str, description: str | None, epilog: str = "") -> argparse.ArgumentParser:
    return argparse.ArgumentParser(
        prog=f"python -m trainers{prog}", description=description, epilog=epilog, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip


def model_flags(command: argparse._ActionsContainer) -> None:
    command.add_argument("--checkpoint", type=Path, required=True, help="a .safetensors file of SD 1.x, SD 2.x or SDXL")
    command.add_argument("--layout", type=Path, help='of a model in other sizes: a JSON of {"unet": {...}, "heads": n}')
    command.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    command.add_argument("--clip-folder", type=Path, default=[], action="append", help="holds judges' files")


def training_flags(command: argparse._ActionsContainer) -> None:
    command.add_argument("--micro-batch-size", type=int, default=0, metavar="N", help="pictures at once; 0: as fit")
    command.add_argument("--checkpoint-every", type=int, default=50, metavar="N", help="in steps")


def method_flags(command: argparse._ActionsContainer) -> None:
    command.add_argument("--preset", help="of the method; by default its first")
    command.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="a setting of the method")
    command.add_argument("--stopper", default="[]", metavar="JSON", help='[{"monitor": "DVAR", "window": 80}]')
    command.add_argument("--seed", type=int, default=0)
    precision_flag(command)


def precision_flag(command: argparse._ActionsContainer) -> None:
    command.add_argument("--precision", choices=["auto", *replay.PRECISIONS], default="auto", help=OFFER)


def word_flags(command: argparse._ActionsContainer, leave: Sequence[str] = ()) -> None:
    """Of a concept, all but some."""
    for word in WORDS:
        if word.name not in leave:
            command.add_argument(
                f"--{word.name.replace('_', '-')}", type=type(word.default), default=word.default,
                choices=CROPS if word.name == "crop" else None,
            )  # fmt: skip


def protocol_flags(command: argparse.ArgumentParser) -> None:
    """What is drawn, and who judges."""
    drawn = command.add_argument_group("what is drawn")
    setting_flags(drawn, Protocol)
    drawn.add_argument("--prompts", type=Path, metavar="FILE", help="your own: one per line, {} is the subject")
    scorer_config = command.add_argument_group("who judges")
    setting_flags(scorer_config, ScorerConfig)
    scorer_config.add_argument(
        "--vqa-download", action="store_true",
        help="also score by VQA (clip-flant5-xxl): the package t2v_metrics then downloads tens of gigabytes",
    )  # fmt: skip


def setting_flags(command: argparse._ActionsContainer, settings: type) -> None:
    """A flag for every field of a dataclass of settings."""
    for each in dataclasses.fields(settings):
        flag, text = f"--{each.name.replace('_', '-')}", each.metadata["help"].replace("%", "%%")
        if type(each.default) is bool:
            command.add_argument(flag, action="store_true", help=text)
        else:
            options = each.metadata.get("options")
            text += f" One of: {', '.join(options)}." if options else ""
            text += f" [{each.default}]" if each.default != "" else ""
            command.add_argument(
                flag, type=type(each.default), default=each.default, choices=options,
                metavar=each.name.upper(), help=text,
            )  # fmt: skip


def settings_of(settings: type, given: argparse.Namespace, what: str):
    """The dataclass that those flags describe."""
    return changed(settings, {each.name: getattr(given, each.name) for each in dataclasses.fields(settings)}, what)


def own_prompts(given: argparse.Namespace) -> str:
    """The text of --prompts; "" without.

    Raises:
        ValueError: the file cannot be read as text.
    """
    return given.prompts.read_text(encoding="utf-8-sig") if given.prompts else ""


def shelf(given: argparse.Namespace) -> ExtractorCache:
    """Where judges are looked for."""
    return ExtractorCache(folders=lambda: given.clip_folder)


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


def progress(say: Say, steps: int, entry: dict) -> None:
    if entry["step"] == 1 or entry["step"] % 10 == 0:
        say(f"{entry['stage']}: step {entry['step']} of {steps}, loss {entry['loss']:.4f}")


def train_command(
    run: Run, models: Models, folder: RunFolder, device: SingleDevice, say: Say, *, micro_batch_size: int, **options
) -> RunResult:
    """A training with its progress in lines, on a device whose free memory is watched where it is a card."""
    card = device.device.type == "cuda"
    return train(
        run, models, folder,
        device=device,
        memory_plan=MemoryPlan(micro_batch_size=micro_batch_size),
        free_memory=(lambda: torch.cuda.mem_get_info(device.device)[0]) if card else None,
        callbacks=Callbacks(on_entry=partial(progress, say, run.recipe.steps), on_notice=say),
        **options,
    )  # fmt: skip


def loader(given: argparse.Namespace) -> Callable[[], Models]:
    """Reads the checkpoint."""
    layout = json.loads(given.layout.read_text(encoding="utf-8")) if given.layout else {}
    return partial(load_models, given.checkpoint, layout.get("unet"), layout.get("heads"))


def starting_from(
    given: argparse.Namespace, asked: Run, about: dict, device: torch.device, say: Say
) -> tuple[Models, str]:
    """The checkpoint's models and their fingerprint; the run's own, where they are what it started from."""
    models, same = replay.starting_models(loader(given), asked, about, device)
    rounding = replay.autoencoder_difference(models, about)
    same = same and rounding < replay.ROUNDING
    models.extractors = shelf(given)
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
