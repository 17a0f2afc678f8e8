"""Reports as images: a table of scores, and grids of the generated images. Tensors `[H, W, 3]` in 0..1."""

import textwrap

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from ..evaluation.report import COLUMNS, DIVERSITY, NOT_MEASURED, Report
from .figure import BAND, BEST, GRID, INK, PALE, font

PROMPTS, REPORTS = "prompts", "reports"  # contents of a row of the grid
TILE, GAP, MARGIN = 256, 6, 18
ROW, SIZE, SMALL = 40, 20, 15


def table(reports: list[Report]) -> Tensor:
    """Draw a row per report, a column per score: mean ± standard deviation, the highest means in blue."""
    rows = [["", *COLUMNS], *([report.title, *(report.cell(name) for name in COLUMNS)] for report in reports)]
    widths = [max(_width(_short(row[i]), SIZE) for row in rows) + 2 * MARGIN for i in range(len(rows[0]))]
    footer = [line for note in notes(reports) for line in textwrap.wrap(note, max(40, sum(widths) // 8))]
    height = ROW * len(rows) + 2 * MARGIN + 22 * len(footer) + (MARGIN if footer else 0)
    sheet = Image.new("RGB", (sum(widths) + 2 * MARGIN, height), "white")
    draw, best = ImageDraw.Draw(sheet), best_of(reports)
    for number, row in enumerate(rows):
        top = MARGIN + ROW * number
        if number and number % 2:
            draw.rectangle([MARGIN, top, sheet.width - MARGIN, top + ROW], fill=BAND)
        for i, text in enumerate(row):
            right = MARGIN + sum(widths[: i + 1]) - MARGIN if i else 2 * MARGIN
            colour = PALE if not number or text == NOT_MEASURED else INK
            if number and i and best.get(COLUMNS[i - 1]) == number - 1:
                colour = BEST
            anchor = "rm" if i else "lm"
            draw.text((right, top + ROW / 2), _short(text), fill=colour, font=font(SIZE), anchor=anchor)
    draw.line([MARGIN, MARGIN + ROW, sheet.width - MARGIN, MARGIN + ROW], fill=GRID, width=2)
    for number, line in enumerate(footer):
        y = 2 * MARGIN + ROW * len(rows) + 22 * number
        draw.text((2 * MARGIN, y), line, fill=PALE, font=font(SMALL))
    return _tensor(sheet)


def best_of(reports: list[Report]) -> dict[str, int]:
    """Return, by column, the report with the highest mean, where there are several; diversity has no best.

    Floor and ceiling do not compete.
    """
    found = {}
    for name in COLUMNS:
        means = {
            i: spread.mean for i, report in enumerate(reports) if not report.role and (spread := report.spread(name))
        }
        if name != DIVERSITY and len(means) > 1:
            found[name] = max(means, key=means.__getitem__)
    return found


def notes(reports: list[Report]) -> list[str]:
    """Return lines that name the metric models, and the reasons for missing scores; each once."""
    found = [f"{name}: {by}" for report in reports for name, by in _together(report.metric_models).items()]
    found += [f"{name}, {NOT_MEASURED}: {why}" for report in reports for name, why in _together(report.missing).items()]
    return [*dict.fromkeys(found)]


def _together(texts: dict[str, str]) -> dict[str, str]:
    """Join columns with the same text: "CLIP-T, CLIP-I seen"."""
    groups: dict[str, list[str]] = {}
    for name in COLUMNS:
        if name in texts:
            groups.setdefault(texts[name], []).append(name)
    return {", ".join(names): text for text, names in groups.items()}


def _short(text: str) -> str:
    return text if len(text) <= 32 else f"{text[:29]}..."


def _width(text: str, size: int) -> int:
    return round(font(size).getlength(text))


def grid(reports: list[Report], rows: str = PROMPTS) -> Tensor:
    """Draw all images, a row per prompt or per report."""
    return by_prompt(reports) if rows == PROMPTS else by_report(reports)


def by_prompt(reports: list[Report]) -> Tensor:
    """Draw a row per prompt; in it each report's images, a column per seed, below the report's label."""
    width, height = _tile(reports)
    prompts = paired_prompts(reports)
    blocks = [max(len(report.seeds()), 1) for report in reports]
    total = sum(blocks) * (width + GAP) + (len(blocks) - 1) * 2 * GAP + GAP
    sheet = Image.new("RGB", (total, 34 + len(prompts) * (height + GAP + 26) + GAP), "white")
    left = GAP
    for number, report in enumerate(reports):
        _block(sheet, report, left, (width, height), [pair[number] for pair in prompts], prompts)
        left += blocks[number] * (width + GAP) + 2 * GAP
    return _tensor(sheet)


def _block(sheet: Image.Image, report: Report, left: int, size: tuple[int, int], own: list[str], pairs: list) -> None:
    draw, (width, height) = ImageDraw.Draw(sheet), size
    draw.text((left, 8), _fitting(report.title, len(report.seeds()) * (width + GAP), 18), fill=INK, font=font(18))
    for row, prompt in enumerate(own):
        top = 34 + row * (height + GAP + 26)
        words = _fitting(prompt, len(report.seeds()) * (width + GAP) - GAP, SMALL)
        draw.text((left, top + 3), words, fill=PALE, font=font(SMALL))
        _seeds(sheet, report, prompt, (left, top + 24), size)


def by_report(reports: list[Report]) -> Tensor:
    """Draw a row per report, its name on the left; a column per prompt, in it a report's images, one per seed.

    Above a column stands the text that its images were compared with; a report with another text has its own.
    """
    size, pairs = _tile(reports), paired_prompts(reports)
    seeds = max(len(report.seeds()) for report in reports)
    names = max(_width(_short(report.title), 18) for report in reports) + 2 * MARGIN
    block, row = seeds * (size[0] + GAP) + GAP, size[1] + GAP
    texts = [[_text(report, pair[i]) for pair in pairs] for i, report in enumerate(reports)]
    heads = [next(filter(None, column), "") for column in zip(*texts, strict=True)]
    own = [[text if text != head else "" for text, head in zip(line, heads, strict=True)] for line in texts]
    above = 22 if any(map(any, own)) else 0
    sheet = Image.new("RGB", (names + len(pairs) * block, 34 + len(reports) * (row + above)), "white")
    _captions(sheet, heads, names, 8, block, INK)
    for number, report in enumerate(reports):
        top = 34 + number * (row + above)
        middle = MARGIN, top + above + size[1] / 2
        ImageDraw.Draw(sheet).text(middle, _short(report.title), fill=INK, font=font(18), anchor="lm")
        _captions(sheet, own[number], names, top, block, PALE)
        for i, pair in enumerate(pairs):
            _seeds(sheet, report, pair[number], (names + i * block, top + above), size)
    return _tensor(sheet)


def _captions(sheet: Image.Image, texts: list[str], left: int, top: int, block: int, colour: str) -> None:
    """Draw a text above each column."""
    for i, text in enumerate(texts):
        words = _fitting(text, block - 2 * GAP, SMALL)
        ImageDraw.Draw(sheet).text((left + i * block, top), words, fill=colour, font=font(SMALL))


def _seeds(sheet: Image.Image, report: Report, prompt: str, corner: tuple[int, int], size: tuple[int, int]) -> None:
    """Draw a prompt's images next to each other, each seed at its place."""
    images = {each.seed: each.image for each in report.of_prompt(prompt)}
    for column, seed in enumerate(report.seeds()):
        if seed in images:
            sheet.paste(_within(images[seed], size), (corner[0] + column * (size[0] + GAP), corner[1]))


def _text(report: Report, prompt: str) -> str:
    return next((each.text for each in report.of_prompt(prompt)), "")


def paired_prompts(reports: list[Report]) -> list[tuple[str, ...]]:
    """Return the prompts of each row: the reports' prompts in their order; "" where one has fewer."""
    lists = [report.prompts() for report in reports]
    return [tuple(each[i] if i < len(each) else "" for each in lists) for i in range(max(map(len, lists)))]


def _tile(reports: list[Report]) -> tuple[int, int]:
    """Return width and height of all tiles: the largest image's, up to TILE on a side and at least half of it."""
    sizes = [each.image.size for report in reports for each in report.images]
    width, height = max(size[0] for size in sizes), max(size[1] for size in sizes)
    scale = min(1.0, TILE / max(width, height))
    scale = max(scale, TILE / 2 / max(width, height))
    return max(1, round(width * scale)), max(1, round(height * scale))


def _within(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    scale = min(size[0] / image.width, size[1] / image.height)
    new = max(1, round(image.width * scale)), max(1, round(image.height * scale))
    way = Image.Resampling.NEAREST if scale >= 2 else Image.Resampling.LANCZOS
    return image if new == image.size else image.resize(new, way)


def _fitting(text: str, room: int, size: int) -> str:
    """Shorten a text to the room it has."""
    if _width(text, size) <= room:
        return text
    while text and _width(f"{text}...", size) > room:
        text = text[:-1]
    return f"{text}..."


def _tensor(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.asarray(image.convert("RGB")) / np.float32(255))
