"""Turns a recipe's dataclass fields into widgets, and checks that arriving values are what a node's inputs allow.

Each setting is defined once: as a field, or as the node's own input.
"""

import copy
import dataclasses
import functools
import inspect
from collections.abc import Collection

from comfy_api.latest import io
from torch import Tensor

from ..trainers.data.concept import Concept
from ..trainers.evaluation.report import Report
from ..trainers.evaluation.scorer import ScorerConfig
from ..trainers.runs.result import RunResult
from ..trainers.text import quoted

# Values of links are checked for what the nodes use of them: other packs' models need not be the host's classes.
SOCKETS = {
    "MODEL": lambda value: hasattr(value, "get_model_object"),
    "CLIP": lambda value: hasattr(value, "cond_stage_model"),
    "VAE": lambda value: getattr(value, "first_stage_model", None) is not None,
    "IMAGE": lambda value: isinstance(value, Tensor) and value.ndim == 4,
    "MASK": lambda value: isinstance(value, Tensor) and value.ndim in (2, 3, 4),
    "PERSONALIZE_CONCEPT": lambda value: isinstance(value, Concept),
    "PERSONALIZE_RECIPE": lambda value: hasattr(value, "stages"),
    "PERSONALIZE_RESULT": lambda value: isinstance(value, RunResult),
    "PERSONALIZE_METRIC_MODELS": lambda value: isinstance(value, ScorerConfig),
    "PERSONALIZE_REPORT": lambda value: isinstance(value, Report),
    "PERSONALIZE_STOPPER": lambda value: isinstance(value, tuple) and all(hasattr(one, "evaluator") for one in value),
}
# Lists of runs and files change while a workflow is open; the nodes of these inputs check them.
CHANGING = ("run", "personalized", "lora", "embedding", "diffusers")
WIDGETS = {"STRING": str, "INT": int, "FLOAT": (int, float), "BOOLEAN": int}


def widgets(settings, shown: Collection[str] | None = None, without: Collection[str] = ()) -> list[io.Input]:
    """Return one widget per field of a dataclass of settings, with that instance's values as defaults.

    All are optional, so that a prompt saved before a field existed still runs.

    Args:
        shown: names of the fields that are not advanced; None leaves that to the fields.
        without: names of fields that another input fills.
    """
    fields = [field for field in dataclasses.fields(settings) if field.name not in without]
    found = [_widget(field, getattr(settings, field.name)) for field in fields]
    for widget in found if shown is not None else ():
        widget.advanced = widget.id not in shown or None
    return found


def _widget(field: dataclasses.Field, default) -> io.Input:
    limits = {name: value for name, value in field.metadata.items() if name != "later"}
    options = {"default": default, "tooltip": limits.pop("help"), "advanced": limits.pop("advanced", None)}
    options["optional"] = True
    if "options" in limits:
        return io.Combo.Input(field.name, options=list(limits["options"]), **options)
    if isinstance(default, bool):
        return io.Boolean.Input(field.name, **options)
    if isinstance(default, int):
        return io.Int.Input(field.name, **limits, **options)
    if isinstance(default, float):
        if limits.pop("slider", False):
            return io.Float.Input(field.name, **limits, step=0.01, display_mode=io.NumberDisplay.slider, **options)
        step = 10.0 ** -(4 if default >= 0.1 or default == 0 else 6)  # fine enough for a learning rate
        return io.Float.Input(field.name, **limits, step=step, round=1e-8, **options)
    if isinstance(default, str):
        return io.String.Input(field.name, multiline=limits.get("lines", False), **options)
    return io.String.Input(field.name, **options | {"default": ""})  # the name of a text file


def checked(execute):
    """Decorate a node's `execute` to refuse values that its inputs do not allow.

    The host only checks values that are typed into widgets: neither values of links, nor NaN, nor text where a link
    belongs. It even passes on a link into an input that the node does not have.
    """
    signature = inspect.signature(execute)
    rest = next((p.name for p in signature.parameters.values() if p.kind is p.VAR_KEYWORD), "")

    @functools.wraps(execute)
    def wrapper(cls, *args, **kwargs):
        schema = cls.define_schema()
        ids = {each.id for each in schema.inputs}
        given = signature.bind_partial(cls, *args, **{name: kwargs[name] for name in kwargs if name in ids})
        values = given.arguments | given.arguments.get(rest, {})
        for each in schema.inputs:
            _check_input(each, values.get(each.id), schema.is_input_list)
        return execute(*given.args, **given.kwargs)

    return wrapper


def filled(settings, values: dict):
    """Return a dataclass of settings with the values of its widgets.

    A prompt saved before a widget existed lacks it, and the host passes None: the settings' own value stays.
    """
    return dataclasses.replace(settings, **{name: value for name, value in values.items() if value is not None})


def valid(check, value) -> bool | str:
    """Return `True`, or the sentence that `check` raises, for `validate_inputs`; linked values are `None` and pass."""
    try:
        if value is not None:
            check(value)
    except ValueError as error:
        return str(error)
    return True


def fits(wanted: io.Input, value) -> bool:
    """Return whether a value is what an input allows."""
    try:
        _check_input(wanted, value, is_list=False)
    except ValueError:
        return False
    return True


def _check_input(wanted: io.Input, value, is_list: bool) -> None:
    if isinstance(wanted, io.Autogrow.Input):
        slot = copy.copy(wanted.template.input)
        slot.id = wanted.id
        for one in value.values() if isinstance(value, dict) else ():
            _check_input(slot, one, is_list)
    elif isinstance(wanted, io.DynamicCombo.Input):
        chosen = {} if value is None else value
        if not isinstance(chosen, dict):
            keys = ", ".join(option.key for option in wanted.options)
            raise ValueError(f"The input {wanted.id} does not accept a link: choose one of {keys}.")
        for option in wanted.options:
            for inner in option.inputs if option.key == chosen.get(wanted.id) else ():
                _check_input(inner, chosen.get(inner.id), is_list)
    elif value is not None or not wanted.optional:
        values = value if is_list and isinstance(value, list) else [value]
        for one in values or ([] if wanted.optional else [None]):
            _check(wanted, one)


def _check(wanted: io.Input, value) -> None:
    kind, name = wanted.get_io_type(), wanted.id
    if kind in SOCKETS and not SOCKETS[kind](value):
        hint = ", from a checkpoint that contains it" if kind in ("CLIP", "VAE") else ""
        raise ValueError(f"The input {name} received no {kind}: connect one{hint}.")
    if kind in WIDGETS and not isinstance(value, WIDGETS[kind]):
        raise ValueError(f"The input {name} needs a {kind}, not {quoted(value)}: connect one, or write it.")
    if kind == "STRING" and not value.isascii():
        _check_text(name, value)
    if kind in ("INT", "FLOAT"):
        low, high = getattr(wanted, "min", None), getattr(wanted, "max", None)
        if not (value >= (value if low is None else low) and value <= (value if high is None else high)):
            raise ValueError(f"The value of {name} is {quoted(value)}: use {low} to {high}.")
    if kind == "COMBO" and name not in CHANGING and value not in wanted.options:
        raise ValueError(f"The value of {name} is {quoted(value)}: choose one of {', '.join(wanted.options)}.")


def _check_text(name: str, text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError(f"The text of {name} contains invalid characters: write it again.") from None
