"""`python -m trainers generate`: generate images with a trained run, a folder for each prompt.

    python -m trainers generate RUN --checkpoint FILE --prompts FILE --out DIR [--images 16 ...]

RUN is the folder of a finished run, as Train and `python -m trainers` write it. The prompts stand one per line, with {}
for the subject. DIR gets a folder for each of them, such as 01_a_photo_of_a_concept_dog, with images 000.png, 001.png
and so on, and prompts.txt, a table of folders and prompts. The defaults are those of AttnDreamBooth's authors: 16
images per prompt in 50 steps from seed 0 on; the same seeds start every prompt from the same latents.
"""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from .. import files
from ..data.prompts import prompts_of
from ..device import SingleDevice
from ..evaluation import prompt_folders, prompt_sets
from ..evaluation.protocol import Protocol
from ..images import to_pil
from ..models import sampler
from ..models.diffusion import Models
from ..runs import restore
from ..settings import same
from ..text import quoted, text_of
from .evaluate import finished
from .options import TEXT_WEIGHT, loader, model_flags, new_parser, setting_flags, settings_of


@dataclass(frozen=True, kw_only=True)
class Generation:
    """Settings of generation; the defaults are those of AttnDreamBooth's authors."""

    images: int = same(Protocol, "seeds", 16)
    first_seed: int = same(Protocol, "first_seed")
    steps: int = same(Protocol, "steps", 50)
    cfg: float = same(Protocol, "cfg")
    batch_size: int = same(Protocol, "batch_size", 8)
    token_format: str = same(Protocol, "token_format")


def parser() -> argparse.ArgumentParser:
    """Return the flags of `generate`."""
    command = new_parser(" generate", __doc__)
    command.add_argument("run", type=Path, metavar="RUN", help="the folder of a finished run")
    model_flags(command)
    command.add_argument("--prompts", type=Path, required=True, metavar="FILE", help="one per line, {} is the subject")
    command.add_argument("--out", type=Path, required=True, metavar="DIR", help="gets a folder for each prompt")
    command.add_argument("--text-weight", **TEXT_WEIGHT)
    setting_flags(command.add_argument_group("generated images"), Generation)
    return command


def main(arguments: Sequence[str]) -> None:
    """Run `generate`."""
    generate(parser().parse_args(arguments))


def generate(given: argparse.Namespace) -> None:
    """Generate and write every prompt's images.

    Raises:
        ValueError: a file is missing, or a setting does not fit; nothing was written then.
    """
    run, result = finished(given.run, given.text_weight)
    concept, settings = run.concept, settings_of(Generation, given, "the generation")
    form = settings.token_format or run.recipe.subject(concept)
    subject = prompt_sets.subject_of(form, concept.placeholder_token, concept.class_word)
    text = text_of(given.prompts, f"The prompt file {quoted(given.prompts.name)}", "check its path")
    prompts = prompts_of(text, subject)
    models = loader(given)().to(given.device, run.dtype)
    restore.put(result, models)
    side, folders = concept.at_resolution(models.resolution), prompt_folders.folder_names(prompts)
    given.out.mkdir(parents=True, exist_ok=True)
    (given.out / "prompts.txt").write_text(prompt_folders.table(prompts, folders), encoding="utf-8")
    for folder, prompt in zip(folders, prompts, strict=True):
        _generate(models, run.dtype, settings, prompt, side, given.out / folder)
        print(f"{folder}: {settings.images} images of {quoted(prompt)}", flush=True)


def _generate(models: Models, dtype: torch.dtype, settings: Generation, prompt: str, side: int, folder: Path) -> None:
    """Write a prompt's images, those of a batch as soon as they exist."""
    folder.mkdir(exist_ok=True)
    for start in range(0, settings.images, settings.batch_size):
        numbers = range(start, min(start + settings.batch_size, settings.images))
        with SingleDevice(device=models.device, dtype=dtype).autocast():
            pixels = sampler.sample(
                models, [prompt] * len(numbers), [settings.first_seed + number for number in numbers],
                size=(side, side), steps=settings.steps, guidance=settings.cfg, batch_size=len(numbers),
            )  # fmt: skip
        for number, image in zip(numbers, pixels, strict=True):
            files.save_png(to_pil(image), folder / f"{number:03d}.png")
