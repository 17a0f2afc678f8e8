"""Flags that the commands of `python -m trainers` share, each defined once, and the loading of a checkpoint."""

import argparse
import dataclasses
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path

import torch

from ..data.concept import Concept
from ..device import PRECISIONS, SingleDevice
from ..evaluation.protocol import Protocol
from ..evaluation.scorer import ScorerConfig
from ..metrics.extractor_cache import ExtractorCache
from ..models.checkpoint import load_models
from ..models.diffusion import Models
from ..recipes import METHODS
from ..recipes.base import Recipe
from ..runs.callbacks import Callbacks
from ..runs.folder import RunFolder
from ..runs.preview import Preview
from ..runs.replay import CROPS
from ..runs.result import RunResult
from ..runs.run import NOT_WORDS, Run, check_lengths
from ..runs.train import train
from ..settings import changed
from ..text import captions_of, quoted
from ..training.memory import MemoryPlan
from ..training.stage import StepReport

METHOD_NAMES = {name.lower().replace(" ", "-"): presets for name, presets in METHODS.items()}
WORDS = [f for f in dataclasses.fields(Concept) if f.name not in NOT_WORDS and isinstance(f.default, (str, int))]
OFFER = "bfloat16 where the card has it, else float16 on a card, else float32"
Say = Callable[[str], None]
# The flag --text-weight of commands that read a run.
TEXT_WEIGHT: dict = {
    "type": float,
    "metavar": "0..1",
    "help": "for a run with Pick by Score: its state with the best identity (0) or text alignment (1); by default the "
    "last",
}


def new_parser(prog: str, description: str | None, epilog: str = "") -> argparse.ArgumentParser:
    """Return a parser whose help keeps the description's lines."""
    return argparse.ArgumentParser(
        prog=f"python -m trainers{prog}", description=description, epilog=epilog, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip


def model_flags(command: argparse._ActionsContainer) -> None:
    """Add the flags of the checkpoint and of the device."""
    command.add_argument("--checkpoint", type=Path, required=True, help="a .safetensors file of SD 1.x, SD 2.x or SDXL")
    command.add_argument("--layout", type=Path, help='JSON of a model of another size: {"unet": {...}, "heads": n}')
    command.add_argument(
        "--device",
        default="cuda" if torch.cuda.is_available() else "cpu",
        help="of torch, such as cuda:1; [%(default)s]",
    )
    command.add_argument(
        "--clip-folder", type=Path, default=[], action="append", help="a folder of metric models' files"
    )


def training_flags(command: argparse._ActionsContainer) -> None:
    """Add the flags of a training that do not change its result."""
    command.add_argument(
        "--micro-batch-size", type=int, default=0, metavar="N", help="images in memory at once; 0: as many as fit"
    )
    command.add_argument("--checkpoint-every", type=int, default=50, metavar="N", help="steps between checkpoints [50]")


def method_flags(command: argparse._ActionsContainer) -> None:
    """Add the flags of a method, its monitors, seed and precision."""
    command.add_argument("--preset", help="settings to start from; by default the method's first preset")
    command.add_argument(
        "--set", action="extend", nargs="+", default=[], metavar="NAME=VALUE", help="settings of the method"
    )
    command.add_argument(
        "--stopper", default="[]", metavar="JSON", help='monitors, such as [{"monitor": "DVAR", "window": 80}]'
    )
    command.add_argument("--seed", type=int, default=0, help="of all random numbers [0]")
    precision_flag(command)


def precision_flag(command: argparse._ActionsContainer) -> None:
    """Add the flag of the precision."""
    command.add_argument("--precision", choices=["auto", *PRECISIONS], default="auto", help=OFFER)


def word_flags(command: argparse._ActionsContainer, leave: Sequence[str] = ()) -> None:
    """Add a flag for each text and number of a concept, without those in `leave`."""
    for word in WORDS:
        if word.name not in leave:
            command.add_argument(
                f"--{word.name.replace('_', '-')}", type=type(word.default), default=word.default,
                choices=CROPS if word.name == "crop" else None,
            )  # fmt: skip


def protocol_flags(command: argparse.ArgumentParser) -> None:
    """Add the flags of generation and of the metric models."""
    generation = command.add_argument_group("generated images")
    setting_flags(generation, Protocol)
    generation.add_argument("--prompts", type=Path, metavar="FILE", help="your own: one per line, {} is the subject")
    scorer_config = command.add_argument_group("metric models")
    setting_flags(scorer_config, ScorerConfig)
    scorer_config.add_argument(
        "--vqa-download", action="store_true",
        help="also score by VQA (clip-flant5-xxl): the package t2v_metrics then downloads tens of gigabytes",
    )  # fmt: skip


def setting_flags(command: argparse._ActionsContainer, settings: type) -> None:
    """Add a flag for every field of a dataclass of settings."""
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
    """Return the dataclass that its flags describe; `what` names it in errors."""
    return changed(settings, {each.name: getattr(given, each.name) for each in dataclasses.fields(settings)}, what)


def own_prompts(given: argparse.Namespace) -> str:
    """Read the file of --prompts; "" without one.

    Raises:
        ValueError: the file cannot be read as text.
    """
    return given.prompts.read_text(encoding="utf-8-sig") if given.prompts else ""


def extractor_cache(given: argparse.Namespace) -> ExtractorCache:
    """Return a cache of feature extractors whose files lie in the folders of --clip-folder."""
    return ExtractorCache(folders=lambda: given.clip_folder)


def settings_help(methods: Iterable[str]) -> str:
    """Return lines with every setting of these methods: the first preset's default, and others that differ."""
    lines = []
    for method in methods:
        presets = METHOD_NAMES[method]
        lines.append(f"\nsettings of {method} (presets: {', '.join(presets)}):")
        fields = {f.name: f for preset in presets.values() for f in dataclasses.fields(preset)}
        lines += [f"  {name}={_defaults(name, presets)}  {f.metadata['help']}" for name, f in fields.items()]
    return "\n".join(lines)


def _defaults(name: str, presets: Mapping[str, Recipe]) -> str:
    """Return a text such as `250 (style: 150)`; presets without the setting are left out."""
    shown = {preset: _shown(getattr(recipe, name)) for preset, recipe in presets.items() if hasattr(recipe, name)}
    first = next(iter(shown.values()))
    others = ", ".join(f"{preset}: {value}" for preset, value in shown.items() if value != first)
    return f"{first} ({others})" if others else first


def _shown(default: object) -> str:
    return "FILE" if default == () else str(default)


def recipe_of(method: str, preset: str | None, changes: Iterable[str]) -> Recipe:
    """Return a preset of a method, by default its first, with `changes` of the form NAME=VALUE.

    Raises:
        ValueError: there is no such preset or setting, or a value does not fit.
    """
    presets = METHOD_NAMES[method]
    recipe = presets.get(preset or next(iter(presets)))
    if recipe is None:
        raise ValueError(f"{method} has no preset {quoted(preset)}: use one of {', '.join(presets)}.")
    defaults = {f.name: f.default for f in dataclasses.fields(recipe)}
    pairs = [text.partition("=")[::2] for text in changes]
    return changed(recipe, {name: value_of(defaults.get(name), text) for name, text in pairs})


def value_of(default: object, text: str) -> object:
    """Convert text to the type of a default; text that does not fit stays text, and is refused later."""
    if isinstance(default, tuple):
        return captions_of(Path(text).read_text(encoding="utf-8"))
    if isinstance(default, str):
        return text
    try:
        return json.loads(text.lower())
    except ValueError:
        return text


def progress(say: Say, steps: int, report: StepReport) -> None:
    """Report the first and every tenth step."""
    if report.step == 1 or report.step % 10 == 0:
        say(f"{report.stage}: step {report.step} of {steps}, loss {report.loss:.4f}")


def train_command(
    run: Run, models: Models, folder: RunFolder, device: SingleDevice, say: Say, *, micro_batch_size: int,
    preview: Preview | None = None, log: Callable[[StepReport], None] = lambda report: None, **options,
) -> RunResult:  # fmt: skip
    """Train with progress in lines of text; on a card the plan fits its free memory.

    Args:
        log: also receives every step.
    """
    preview = preview or Preview()
    tokenizers = [encoder.tokenizer for encoder in models.text_encoders]
    for sentence in check_lengths(run, preview.used_prompts, tokenizers):
        say(sentence)
    card = device.device.type == "cuda"

    def on_step(report: StepReport) -> None:
        progress(say, run.recipe.steps, report)
        log(report)

    return train(
        run, models, folder,
        device=device,
        preview=preview,
        memory_plan=MemoryPlan(micro_batch_size=micro_batch_size),
        free_memory=(lambda: torch.cuda.mem_get_info(device.device)[0]) if card else None,
        callbacks=Callbacks(on_step=on_step, on_notice=say, on_warning=say),
        **options,
    )  # fmt: skip


def loader(given: argparse.Namespace) -> Callable[[], Models]:
    """Return the function that reads the checkpoint."""
    layout = json.loads(given.layout.read_text(encoding="utf-8")) if given.layout else {}
    return partial(load_models, given.checkpoint, layout.get("unet"), layout.get("heads"))
