"""What a fidelity study leaves behind: a folder per cell, then one table, one JSON and image grids over all cells.

Knows files, means and images; it neither draws, trains nor scores.
"""

import json
import statistics
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

COLUMNS = ("identity", "identity_named", "identity_unnamed", "text")
RIGHT = ("subject_right", "colour_right", "pattern_right", "extra_right", "extra_colour_right", "second_right")
SIDE, LABEL = 128, 150


def array(image: Image.Image) -> np.ndarray:
    return np.array(image.convert("RGB"))


def strip(images: list) -> Image.Image:
    """Images of one size side by side; unstrip takes them apart again."""
    return Image.fromarray(np.concatenate([array(image) for image in images], axis=1))


def unstrip(image: Image.Image) -> list:
    return [image.crop((x, 0, x + SIDE, SIDE)) for x in range(0, image.width, SIDE)]


def read(cell: Path) -> dict | None:
    path = cell / "scores.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def write(cell: Path, record: dict):
    """Written beside and renamed: a cell is there whole or not at all."""
    (cell / "scores.tmp").write_text(json.dumps(record), encoding="utf-8")
    (cell / "scores.tmp").replace(cell / "scores.json")


def mean(values) -> float:
    return sum(values) / len(values)


def standard_error(values) -> float | None:
    """Of the mean over individuals; None for a single one."""
    return statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else None


def cells(out: Path, method: str, numbers) -> dict[int, dict]:
    """The finished cells of a row by the individual's number."""
    found = {number: read(out / "cells" / method / f"{number:03d}") for number in numbers}
    return {number: record for number, record in found.items() if record}


def summary(records: dict[int, dict]) -> dict:
    """Per score: the individuals' means ("each", by number), their mean and its standard error.

    Some details exist in some individuals only.
    """
    every = [name for record in records.values() for name in record["scores"]]
    result = {"individuals": len(records)}
    for name in dict.fromkeys(every):
        each = {number: mean(record["scores"][name]) for number, record in records.items() if name in record["scores"]}
        values = list(each.values())
        result[name] = {"mean": mean(values), "standard_error": standard_error(values), "each": each}
    for name in ("train_seconds", "steps"):
        known = [record["facts"][name] for record in records.values() if name in record["facts"]]
        result |= {name: mean(known)} if known else {}
    return result


def over_individuals(function, *rows: dict) -> dict | None:
    """A function of the rows' means over the individuals that all rows have, and its jackknife error."""
    common = sorted(set.intersection(*(set(row) for row in rows)))
    if not common:
        return None

    def without(left_out: int | None) -> float:
        return function(*(mean([row[number] for number in common if number != left_out]) for row in rows))

    if len(common) == 1:
        return {"mean": without(None), "standard_error": None}
    values = [without(number) for number in common]
    spread = sum((value - mean(values)) ** 2 for value in values)
    return {"mean": without(None), "standard_error": ((len(common) - 1) / len(common) * spread) ** 0.5}


def closed(rows: dict, method: str, name: str) -> dict | None:
    """The share of the way from floor to ceiling: (row - untuned) / (real - untuned), of means."""
    if not {method, "untuned", "real"} <= rows.keys():
        return None
    own, floor, ceiling = (rows[row][name]["each"] for row in (method, "untuned", "real"))
    return over_individuals(lambda own, floor, ceiling: (own - floor) / (ceiling - floor), own, floor, ceiling)


def kept(rows: dict, method: str) -> dict | None:
    """Text alignment relative to the floor's."""
    if "untuned" not in rows:
        return None
    return over_individuals(
        lambda own, floor: own / floor, rows[method]["text"]["each"], rows["untuned"]["text"]["each"]
    )


def figure(entry: dict | None) -> str:
    if not entry:
        return "-"
    error = entry["standard_error"]
    return f"{entry['mean']:.3f}" + (f" ± {error:.3f}" if error is not None else "")


def table(rows: dict) -> str:
    """Markdown. "closed" columns are shares of the gap between the rows untuned and real."""
    head = [
        "row",
        "n",
        *COLUMNS,
        "text / untuned",
        "gap closed",
        "named closed",
        "never-named closed",
        *(name[:-6] + " right" for name in RIGHT),
        "s",
    ]
    lines = [head, ["---"] * len(head)]
    for method, row in rows.items():
        cells = [method, str(row["individuals"]), *(figure(row.get(name)) for name in COLUMNS)]
        cells.append(figure(kept(rows, method)))
        cells += [figure(closed(rows, method, name)) for name in COLUMNS[:3]]
        cells += [f"{row[name]['mean']:.2f}" if name in row else "-" for name in RIGHT]
        lines.append([*cells, f"{row['train_seconds']:.0f}" if "train_seconds" in row else "-"])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def grid(out: Path, methods, number: int, prompts, seeds: int) -> Image.Image | None:
    """Reference | one row per method | one column per prompt, the first seed of each."""
    rows = []
    for method in methods:
        path = out / "cells" / method / f"{number:03d}" / "pictures.png"
        if not path.exists():
            continue
        reference, *pictures = unstrip(Image.open(path))
        rows.append((method, [reference, *pictures[::seeds][: len(prompts)]]))
    if not rows:
        return None
    sheet = Image.new("RGB", (LABEL + (1 + len(prompts)) * (SIDE + 4), 20 + len(rows) * (SIDE + 4)), "white")
    pen = ImageDraw.Draw(sheet)
    for column, text in enumerate(("reference", *(prompt.replace(" of {}", "") for prompt in prompts))):
        pen.text((LABEL + column * (SIDE + 4), 4), text.removeprefix("a photo ").removeprefix("a ")[:22], fill="black")
    for line, (method, pictures) in enumerate(rows):
        pen.text((4, 20 + line * (SIDE + 4) + SIDE // 2), method.replace("textboost-", "- "), fill="black")
        for column, picture in enumerate(pictures):
            sheet.paste(picture, (LABEL + column * (SIDE + 4), 20 + line * (SIDE + 4)))
    return sheet


def report(out: Path, methods, numbers, settings: dict):
    """table.md, results.json and grids/NNN.png from whatever cells are there."""
    found = {method: cells(out, method, numbers) for method in methods}
    rows = {method: summary(records) for method, records in found.items() if records}
    for method, row in rows.items():
        row |= {"closed": {name: closed(rows, method, name) for name in COLUMNS[:3]}, "text_kept": kept(rows, method)}
    (out / "results.json").write_text(json.dumps({"settings": settings, "rows": rows}, indent=1), encoding="utf-8")
    (out / "table.md").write_text(table(rows) + "\n", encoding="utf-8")
    (out / "grids").mkdir(exist_ok=True)
    for number in numbers:
        sheet = grid(out, methods, number, settings["prompts"], len(settings["seeds"]))
        if sheet:
            sheet.save(out / "grids" / f"{number:03d}.png")
    print(table(rows))
