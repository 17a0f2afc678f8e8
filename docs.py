"""Writes the tables of settings into README.md, from the dataclasses that define them: `python dev.py docs`.

A test fails while README.md holds another table than this would write.
"""

import html
from dataclasses import MISSING, fields
from pathlib import Path

README = Path(__file__).resolve().parent / "README.md"
BEGIN, END = "<!-- settings: written by python dev.py docs -->", "<!-- end of settings -->"


def filled(text: str, methods: dict) -> str:
    """`text` with a table for each node between the two marks.

    Args:
        methods: display name of a node -> its presets.
    """
    before, _, rest = text.partition(BEGIN)
    _, found, after = rest.partition(END)
    if not found:
        raise ValueError(f"README.md lacks the marks {BEGIN} and {END}.")
    tables = "\n\n".join(f"**{name}**\n\n{table(presets)}" for name, presets in methods.items())
    return f"{before}{BEGIN}\n\n{tables}\n\n{END}{after}"


def table(presets: dict) -> str:
    """One row per field of any preset; of those after the first that has it, only what differs from that one."""
    rows = [["setting", *presets, "meaning"], ["---"] * (len(presets) + 2)]
    every = {}
    for field in (field for preset in presets.values() for field in fields(preset)):
        every.setdefault(field.name, field)
    for field in every.values():
        values = [getattr(preset, field.name, MISSING) for preset in presets.values()]
        first = next(value for value in values if value is not MISSING)
        begin = values.index(first)
        defaults = [shown(value) if i <= begin or value != first else "" for i, value in enumerate(values)]
        meaning = html.escape(field.metadata["help"], quote=False)  # or <dog> would vanish as an unknown tag
        rows.append([f"`{field.name}`", *defaults, meaning])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def shown(value) -> str:
    """A default as its widget shows it."""
    if value is MISSING:
        return "–"
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, tuple):
        return ", ".join(value) or "-"
    return f"{value:g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    from trainers.recipes import METHODS

    README.write_text(filled(README.read_text(encoding="utf-8"), METHODS), encoding="utf-8")
