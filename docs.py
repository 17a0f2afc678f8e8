"""Writes the tables of settings into the help pages, from the dataclasses that define them: `python dev.py docs`.

A test fails while a page has another table than this would write.
"""

import html
import re
from collections.abc import Collection
from dataclasses import MISSING, fields
from importlib import import_module
from pathlib import Path

PAGES = Path(__file__).resolve().parent / "js" / "docs"
BEGIN, END = "<!-- settings: written by python dev.py docs -->", "<!-- end of settings -->"


def page(node: str) -> Path:
    """Return the help page of a node with a table, by its display name."""
    words = re.findall(r"[A-Za-z]+", node)
    return PAGES / "".join(["Personalize", *(word[0].upper() + word[1:] for word in words)]) / "en.md"


def filled(text: str, table: str) -> str:
    """Return a help page's text with the table of its settings between the two marks."""
    before, _, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not end:
        raise ValueError(f"The help page lacks its marks: write {BEGIN} and {END} where the table belongs.")
    return f"{before}{BEGIN}\n\n{table}\n\n{END}{after}"


def table(presets: dict, without: Collection[str] = ()) -> str:
    """Return one row per field of any preset; cells after the first preset with it are empty if they are equal.

    Args:
        without: names of fields that stand on another node.
    """
    rows = [["setting", *presets, "meaning"], ["---"] * (len(presets) + 2)]
    every = {}
    for field in (field for preset in presets.values() for field in fields(preset)):
        every.setdefault(field.name, field)
    for field in (field for name, field in every.items() if name not in without):
        values = [getattr(preset, field.name, MISSING) for preset in presets.values()]
        first = next(value for value in values if value is not MISSING)
        begin = values.index(first)
        defaults = [shown(value) if i <= begin or value != first else "" for i, value in enumerate(values)]
        meaning = html.escape(field.metadata["help"], quote=False)  # or <dog> would vanish as an unknown tag
        rows.append([f"`{field.name}`", *defaults, meaning])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def shown(value) -> str:
    """Return a default as its widget shows it, on one line."""
    if value is MISSING:
        return "–"
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, tuple):
        return ", ".join(value) or "empty"
    return f"{value:g}" if isinstance(value, float) else str(value).replace("\n", "<br>") or "empty"


def nodes(trainers: str) -> dict[str, str]:
    """Return display name -> table of settings of Metric Models and of every recipe's and monitor's node.

    Args:
        trainers: the name that the package `trainers` is imported by.
    """
    recipes, scorer, dvar, clip, monitor, scores = (
        import_module(f"{trainers}.{name}")
        for name in (
            "recipes",
            "evaluation.scorer",
            "stopping.dvar",
            "stopping.clip_early_stopping",
            "stopping.monitor",
            "stopping.pick_by_score",
        )
    )
    with_presets = {dvar.DVAR.name: dvar.PRESETS, clip.ClipEarlyStopping.name: clip.PRESETS}
    without = {kind.name: {"default": kind()} for kind in (monitor.FixedSteps, scores.PickByScore)}
    presets = {**recipes.METHODS, **with_presets, **without}
    metric_models = {field.name for field in fields(scorer.ScorerConfig)}
    return {
        "Metric Models": table({"default": scorer.ScorerConfig()}),
        **{node: table(values, metric_models) for node, values in presets.items()},
    }


if __name__ == "__main__":
    for node, settings in nodes("trainers").items():
        file = page(node)
        file.write_text(filled(file.read_text(encoding="utf-8"), settings), encoding="utf-8")
