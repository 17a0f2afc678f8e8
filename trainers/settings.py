"""One definition per setting: a dataclass field with the text and the limits that its widget shows."""

from dataclasses import field


def setting(default, help: str, **limits):
    """A hyperparameter with the text and the limits that its widget shows."""
    return field(default=default, metadata={"help": help, **limits})


def same(owner: type, name: str, *default):
    """Another dataclass's setting of that name, with its default or a new one."""
    known = owner.__dataclass_fields__[name]
    return field(default=default[0] if default else known.default, metadata=known.metadata)
