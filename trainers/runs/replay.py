"""Runs read from their folder, to be trained again elsewhere: the inverse of `Run.settings`."""

import json
from pathlib import Path

from ..data.concept import Concept
from ..device import PRECISIONS
from ..recipes import METHODS
from ..settings import changed, checked
from ..stopping.clip_early_stopping import ClipEarlyStopping
from ..stopping.dvar import DVAR
from ..stopping.monitor import FixedSteps, Monitor
from ..stopping.pick_by_score import PickByScore
from ..text import quoted
from . import saved_images
from .info import RunInfo
from .run import NOT_WORDS, RUN_FORMAT, Run

RECIPES = {type(preset).__name__: type(preset) for presets in METHODS.values() for preset in presets.values()}
MONITORS = {monitor.name: monitor for monitor in (DVAR, ClipEarlyStopping, FixedSteps, PickByScore)}
CROPS = ("auto", "center", "random", "bucket")


def read(path: Path) -> Run:
    """Read the run of a run.json, with the images next to it.

    Raises:
        ValueError: it is not a run.json of this version, or an image is missing.
    """
    try:
        settings = RunInfo.parse(json.loads(path.read_text(encoding="utf-8"))).settings
        concept, recipe = dict(settings["concept"]), dict(settings["recipe"])
    except (OSError, ValueError, LookupError, TypeError, RecursionError) as error:
        raise ValueError(f"{path.name} does not describe a run: give the run.json of a run's folder.") from error
    if settings.get("run_format") != RUN_FORMAT:
        raise ValueError(f"{path.name} is of another version of this pack: use the one that wrote it.")
    if settings.get("method") not in RECIPES:
        raise ValueError(f"There is no method {quoted(settings.get('method'))}: choose one of {', '.join(RECIPES)}.")
    if settings.get("precision") not in PRECISIONS:
        raise ValueError(f"The precision is {quoted(settings.get('precision'))}: use {', '.join(PRECISIONS)}.")
    if type(settings.get("seed")) is not int:
        raise ValueError(f"The seed is {quoted(settings.get('seed'))}: use a whole number.")
    return Run(
        concept=concept_of(concept, saved_images.read(path.parent)),
        recipe=changed(RECIPES[settings["method"]], recipe),
        stopper=monitors(settings.get("stopper", [])),
        seed=settings["seed"],
        dtype=PRECISIONS[settings["precision"]],
    )


def concept_of(words: dict, images: dict) -> Concept:
    """Return the concept of these words and images."""
    if not images["images"]:
        raise ValueError("The run's folder has no images next to its run.json: copy the whole folder.")
    if wrong := set(words) & set(NOT_WORDS):
        raise ValueError(f"The concept in run.json has {', '.join(sorted(wrong))}, which are not words: take them out.")
    if words.get("crop", CROPS[0]) not in CROPS:
        raise ValueError(f"The crop is {quoted(words['crop'])}: use one of {', '.join(CROPS)}.")
    return Concept(**images, **checked(Concept, words))


def monitors(settings: list[dict]) -> tuple[Monitor, ...]:
    """Return the monitors of these settings, each with a monitor's name.

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
