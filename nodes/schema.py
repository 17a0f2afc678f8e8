"""A recipe's dataclass fields as widgets: one definition per setting, the field."""

import dataclasses

from comfy_api.latest import io


def widgets(recipe) -> list[io.Input]:
    """One widget per field of a recipe, with that instance's values as defaults.

    All are optional, so that a prompt saved before a field existed still runs.
    """
    return [_widget(field, getattr(recipe, field.name)) for field in dataclasses.fields(recipe)]


def _widget(field: dataclasses.Field, default) -> io.Input:
    limits = dict(field.metadata)
    options = {"default": default, "tooltip": limits.pop("help"), "advanced": limits.pop("advanced", None)}
    options["optional"] = True
    if "options" in limits:
        return io.Combo.Input(field.name, options=list(limits["options"]), **options)
    if isinstance(default, bool):
        return io.Boolean.Input(field.name, **options)
    if isinstance(default, int):
        return io.Int.Input(field.name, **limits, **options)
    if isinstance(default, float):
        step = 10.0 ** -(4 if default >= 0.1 or default == 0 else 6)  # fine enough for a learning rate
        return io.Float.Input(field.name, **limits, step=step, round=1e-8, **options)
    return io.String.Input(field.name, **options | {"default": ""})  # lines of text, by the name of a file
