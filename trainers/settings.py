"""One definition per setting: a dataclass field with the text and the limits that its widget shows."""

from dataclasses import Field, asdict, field, fields, replace
from typing import TypeVar

from .text import quoted

T = TypeVar("T")
KINDS = {int: "a whole number", float: "a number", bool: "true or false", str: "text", tuple: "a list of texts"}


def setting(default: T, help: str, **limits) -> T:
    """Declare a hyperparameter with the text and the limits that its widget shows.

    Among the limits, `later=True` marks a setting that does not change the training: see `decisive`.
    """
    return field(default=default, metadata={"help": help, **limits})


def same(owner: type, name: str, *default):
    """Declare another dataclass's setting of that name, with its default or a new one."""
    known = {each.name: each for each in fields(owner)}[name]
    return field(default=default[0] if default else known.default, metadata=known.metadata)


def part(kind: type, settings):
    """Return a smaller dataclass of settings out of one that has its fields among others."""
    return kind(**{each.name: getattr(settings, each.name) for each in fields(kind)})


def decisive(settings) -> dict:
    """Return the values of a dataclass of settings that decide what is learned."""
    later = {each.name for each in fields(settings) if each.metadata.get("later")}
    return {name: value for name, value in asdict(settings).items() if name not in later}


def changed(settings, values: dict, what: str = ""):
    """Return a dataclass of settings, or a class of them with its defaults, with other values: see `checked`."""
    values = checked(settings, values, what)
    return settings(**values) if isinstance(settings, type) else replace(settings, **values)


def checked(settings, values: dict, what: str = "") -> dict:
    """Check values as JSON has them, and return them as the fields of a dataclass of settings hold them.

    Args:
        what: name of the settings in messages; by default their class's.

    Raises:
        ValueError: there is no such setting, or a value is not of its kind or beyond its limits.
    """
    what = what or (settings if isinstance(settings, type) else type(settings)).__name__
    known = {f.name: f for f in fields(settings)}
    for name in values:
        if name not in known:
            raise ValueError(f"{what} has no setting {quoted(name)}: use {', '.join(known)}.")
    return {name: _checked(what, known[name], value) for name, value in values.items()}


def _checked(what: str, field: Field, value):
    kind, limits = type(field.default), field.metadata
    if kind is tuple and isinstance(value, (list, tuple)) and all(isinstance(one, str) for one in value):
        return tuple(value)
    if kind is float and type(value) is int:
        value = float(value)
    low, high, options = limits.get("min"), limits.get("max"), limits.get("options")
    if type(value) is not kind:
        use = KINDS[kind]
    elif options and value not in options:
        use = f"one of {', '.join(options)}"
    elif kind in (int, float) and not ((low is None or value >= low) and (high is None or value <= high)):
        use = f"{low} to {high}"
    else:
        return value
    raise ValueError(f"The value of {field.name} of {what} is {quoted(value)}: use {use}.")
