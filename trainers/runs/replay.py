"""A run read back from its folder: the inverse of `Run.settings`, so that it can be trained once more elsewhere."""

import json
from collections.abc import Callable
from pathlib import Path

import torch

from ..data.concept import Concept
from ..models.diffusion import Models
from ..models.fingerprint import encoded_sample, starting_point
from ..recipes import METHODS
from ..settings import changed, checked
from ..stopping.clip_early_stopping import ClipEarlyStopping
from ..stopping.dvar import DVAR
from ..stopping.monitor import FixedSteps, Monitor
from ..stopping.pick_by_score import PickByScore
from ..text import quoted
from . import saved_images
from .run import NOT_WORDS, RUN_FORMAT, Run

RECIPES = {type(preset).__name__: type(preset) for presets in METHODS.values() for preset in presets.values()}
MONITORS = {monitor.name: monitor for monitor in (DVAR, ClipEarlyStopping, FixedSteps, PickByScore)}
PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
ROUNDING = 1e-2  # of latents of about 1: half precision makes less, another autoencoder more
CROPS = ("center", "random", "bucket")
# How ComfyUI may keep what a file holds in float32: the text encoders, and the U-Net.
ROUNDED = ((None, None), (torch.float16, None), (torch.float16, torch.float16), (torch.float16, torch.bfloat16))


def read(path: Path) -> tuple[Run, dict]:
    """The run of a run.json, with the pictures beside it, and what the file says.

    Raises:
        ValueError: it is no run.json, or one of another version; or a picture is missing.
    """
    try:
        about = json.loads(path.read_text(encoding="utf-8"))
        settings = dict(about["settings"])
        concept, recipe = dict(settings["concept"]), dict(settings["recipe"])
    except (OSError, ValueError, LookupError, TypeError, RecursionError) as error:
        raise ValueError(f"{path.name} is no description of a run: give the run.json of a run's folder.") from error
    if settings.get("run_format") != RUN_FORMAT:
        raise ValueError(f"{path.name} is of another version of this pack: use the one that wrote it.")
    if settings.get("method") not in RECIPES:
        raise ValueError(f"There is no method {quoted(settings.get('method'))}: choose one of {', '.join(RECIPES)}.")
    if settings.get("precision") not in PRECISIONS:
        raise ValueError(f"The precision is {quoted(settings.get('precision'))}: use {', '.join(PRECISIONS)}.")
    if type(settings.get("seed")) is not int:
        raise ValueError(f"The seed is {quoted(settings.get('seed'))}: use a whole number.")
    run = Run(
        concept=concept_of(concept, saved_images.read(path.parent)),
        recipe=changed(RECIPES[settings["method"]], recipe),
        stopper=monitors(settings.get("stopper", [])),
        seed=settings["seed"],
        dtype=PRECISIONS[settings["precision"]],
    )
    return run, about


def concept_of(words: dict, pictures: dict) -> Concept:
    """A concept of its words and its pictures."""
    if not pictures["images"]:
        raise ValueError("The run's folder has no images beside its run.json: copy the whole folder.")
    if wrong := set(words) & set(NOT_WORDS):
        raise ValueError(f"A concept has no word {', '.join(sorted(wrong))}: take it out of run.json.")
    if words.get("crop", CROPS[0]) not in CROPS:
        raise ValueError(f"The crop is {quoted(words['crop'])}: use one of {', '.join(CROPS)}.")
    return Concept(**pictures, **checked(Concept, words))


def monitors(settings: list[dict]) -> tuple[Monitor, ...]:
    """The stopper of its settings, each with the monitor's name.

    Raises:
        ValueError: there is no such monitor or setting.
    """
    found = []
    for each in settings if isinstance(settings, list) else [settings]:
        values = dict(each) if isinstance(each, dict) else {}
        name = values.pop("monitor", None)
        if name not in MONITORS:
            raise ValueError(f"There is no monitor {quoted(name)}: choose one of {', '.join(MONITORS)}.")
        found.append(changed(MONITORS[name], values, name))
    return tuple(found)


def starting_models(load: Callable[[], Models], run: Run, about: dict, device: torch.device) -> tuple[Models, bool]:
    """The models of a file as a run began with them, and whether they are the same, weight for weight.

    ComfyUI keeps text encoders in float16 and some U-Nets in less than their file has: where that makes the models
    those of the run, they are rounded alike. A file that is another model's stays as it is.

    Args:
        load: reads the file.
        about: the run's run.json.
    """
    for dtypes in ROUNDED if "weights" in about else ():
        models = _rounded(load(), *dtypes).to("cpu", run.dtype)
        if starting_point(models, device) == about["weights"]:
            return models, True
    return load().to("cpu", run.dtype), False


def autoencoder_difference(models: Models, about: dict) -> float:
    """The largest difference between what the autoencoder makes of a picture and what the run's made of it."""
    if not isinstance(known := about.get("encoded"), list):
        return 0.0
    pairs = zip(encoded_sample(models), known, strict=False)
    return max(abs(ours - theirs) for ours, theirs in pairs)


def _rounded(models: Models, text_dtype: torch.dtype | None, unet_dtype: torch.dtype | None) -> Models:
    for encoder in models.text_encoders if text_dtype else ():
        encoder.to(text_dtype).float()
    if unet_dtype:
        torch.nn.Module.to(models.unet, unet_dtype)  # diffusers' own `to` warns about half precision
    return models
