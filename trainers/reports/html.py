"""Reports as one page without other files: images are data inside it; no script, nothing from the network."""

import base64
import io
from html import escape

from PIL import Image

from ..evaluation.report import CLIP_T, COLUMNS, DIVERSITY, NOT_MEASURED, Report
from .grid import best_of, notes, paired_prompts

LONGEST_SIDE = 512  # of an image in the page; smaller ones are embedded without loss
SMALL_IMAGE = 192
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
STYLE = """
:root { color-scheme: light dark; --ink: #1b2430; --pale: #64707f; --line: #dfe4ea; --ground: #f6f7f9; --card: #fff;
  --best: #1d4ed8; --bar: #c7d7f8; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e9ee; --pale: #98a2b0; --line: #313945; --ground: #14181e;
  --card: #1c222b; --best: #8ab4ff; --bar: #2c4372; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--ground); color: var(--ink); }
body { font: 15px/1.5 system-ui, "Segoe UI", Roboto, sans-serif; }
main { max-width: 1240px; margin: 0 auto; padding: 40px 28px 64px; }
h1 { font-size: 30px; line-height: 1.2; margin: 0 0 4px; letter-spacing: -0.01em; }
.note { font-size: 13px; }
h2 { font-size: 19px; margin: 40px 0 12px; }
.lead, .note, figcaption, th, td.none { color: var(--pale); }
.lead { margin: 0 0 26px; }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 12px; }
.card { padding: 18px 22px; overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th { font-weight: 500; font-size: 13px; text-align: right; padding: 6px 12px; white-space: nowrap; }
td { text-align: right; padding: 9px 12px; border-top: 1px solid var(--line); }
td { white-space: nowrap; vertical-align: top; }
th:first-child, td:first-child { text-align: left; padding-left: 0; white-space: normal; }
td small { color: var(--pale); margin-left: 5px; }
td .bar { display: block; height: 4px; border-radius: 2px; background: var(--line); margin-top: 6px; min-width: 84px; }
td .bar i { display: block; height: 4px; border-radius: 2px; background: var(--bar); }
td.best b { color: var(--best); } td.best .bar i { background: var(--best); }
td b, td:first-child { font-weight: 600; }
td.none { font-style: italic; }
details { margin-top: 12px; } summary { cursor: pointer; color: var(--pale); }
.row { margin-bottom: 14px; } .sides { display: flex; flex-wrap: wrap; gap: 22px; }
.side { flex: 1 1 320px; min-width: 0; } .side p { margin: 0 0 8px; overflow-wrap: anywhere; }
.side .label { font-size: 12px; text-transform: uppercase; letter-spacing: 0.06em; color: var(--pale); margin: 0; }
.images { display: grid; grid-template-columns: repeat(auto-fill, minmax(112px, 1fr)); gap: 10px; }
figure { margin: 0; } figure img { width: 100%; display: block; border-radius: 8px; background: var(--ground); }
.tiny img { image-rendering: pixelated; }
figcaption { font-size: 12px; line-height: 1.35; margin-top: 4px; font-variant-numeric: tabular-nums; }
.plot { margin-top: 28px; } .plot img { display: block; max-width: 100%; margin: 0 auto; border-radius: 8px; }
.references { grid-template-columns: repeat(auto-fill, minmax(112px, 132px)); }
"""


def page(reports: list[Report], scatter: Image.Image | None = None) -> str:
    """Return the page of HTML; all user text is escaped."""
    *some, last = dict.fromkeys(report.label for report in reports)
    title = escape(" and ".join([", ".join(some), last] if some else [last]))
    first = reports[0]
    count = f"{len(first.prompts())} prompts, {len(first.seeds())} seeds, {len(first.images)} images each"
    body = [
        f'<h1>{title}</h1><p class="lead">{count if len(reports) > 1 else count.removesuffix(" each")}</p>',
        f'<div class="card">{_scores(reports)}</div>{_metric_models(reports)}',
        _scatter(scatter) if scatter else "",
        _references(first),
        "<h2>Images</h2>",
        *(_row(reports, prompts) for prompts in paired_prompts(reports)),
        "<h2>By prompt and by seed</h2>",
        *(_details(report) for report in reports),
        "<h2>How it was measured</h2>",
        *(_settings(report) for report in reports),
    ]
    return document(title, "".join(body))


def document(title: str, body: str) -> str:
    """Return a page of HTML; title and body are escaped already."""
    head = f'<meta charset="utf-8"><meta http-equiv="Content-Security-Policy" content="{POLICY}">'
    head += f'<meta name="viewport" content="width=device-width, initial-scale=1"><title>{title}</title>'
    head = f"<head>{head}<style>{STYLE}</style></head>"
    return f'<!doctype html><html lang="en">{head}<body><main>{body}</main></body></html>\n'


def _table(names: list[str], rows: list[str]) -> str:
    heads = "".join(f"<th>{escape(name)}</th>" for name in names)
    return f"<table><thead><tr>{heads}</tr></thead><tbody>{''.join(rows)}</tbody></table>"


def _scores(reports: list[Report]) -> str:
    best, longest = best_of(reports), {name: _longest(reports, name) for name in COLUMNS}
    rows = []
    for number, report in enumerate(reports):
        cells = [_cell(report, name, longest[name], best.get(name) == number) for name in COLUMNS]
        rows.append(f"<tr><td>{escape(report.title)}</td>{''.join(cells)}</tr>")
    return _table(["", *COLUMNS], rows)


def _longest(reports: list[Report], column: str) -> float:
    return max((found.mean for report in reports if (found := report.spread(column))), default=0.0)


def _cell(report: Report, column: str, longest: float, best: bool) -> str:
    """Return a mean with its deviation over a bar whose full length is the column's highest mean."""
    found = report.spread(column)
    if found is None:
        return f'<td class="none" title="{escape(report.missing.get(column, ""))}">{NOT_MEASURED}</td>'
    part = 100 * max(0.0, found.mean) / longest if longest > 0 else 0
    bar = f'<span class="bar"><i style="width:{part:.1f}%"></i></span>'
    return f"<td{' class=best' if best else ''}><b>{found.mean:.3f}</b><small>± {found.std:.3f}</small>{bar}</td>"


def _metric_models(reports: list[Report]) -> str:
    lines = ["Mean ± standard deviation over images; of diversity over prompts.", *notes(reports)]
    return f'<p class="note">{"<br>".join(map(escape, lines))}</p>'


def _scatter(image: Image.Image) -> str:
    """Return the plot, which has its own heading."""
    return f'<div class="card plot"><img src="{_data(image, "png")}" alt="Identity against text"></div>'


def _references(report: Report) -> str:
    figures = [_figure(image, kind) for kind, images in report.references.items() for image in images]
    return f'<h2>References</h2><div class="images references">{"".join(figures)}</div>' if figures else ""


def _row(reports: list[Report], prompts: tuple[str, ...]) -> str:
    sides = [_side(report, prompt) for report, prompt in zip(reports, prompts, strict=True) if prompt]
    return f'<section class="row card"><div class="sides">{"".join(sides)}</div></section>'


def _side(report: Report, prompt: str) -> str:
    figures = [_figure(each.image, f"seed {each.seed}", *_lines(each.scores)) for each in report.of_prompt(prompt)]
    head = f'<p class="label">{escape(report.title)}</p><p>{escape(prompt)}</p>'
    return f'<div class="side">{head}<div class="images">{"".join(figures)}</div></div>'


def _lines(scores: dict[str, float]) -> list[str]:
    """Return the scores below an image: text alignment, and identity by unseen references where there are some."""
    unseen = any(name.endswith(" unseen") for name in scores)
    chosen = [CLIP_T, *(f"{score} {'unseen' if unseen else 'seen'}" for score in ("CLIP-I", "DINO"))]
    return [f"{name} {scores[name]:.3f}" for name in chosen if name in scores]


def _figure(image: Image.Image, *lines: str) -> str:
    tiny = ' class="tiny"' if max(image.size) < SMALL_IMAGE else ""
    text = "<br>".join(map(escape, lines))
    return f'<figure{tiny}><img src="{data_uri(image)}" alt=""><figcaption>{text}</figcaption></figure>'


def data_uri(image: Image.Image) -> str:
    """Encode small images as PNG, larger ones as JPEG."""
    copy = image.convert("RGB")
    kind, options = ("png", {}) if max(image.size) <= SMALL_IMAGE else ("jpeg", {"quality": 88})
    copy.thumbnail((LONGEST_SIDE, LONGEST_SIDE))
    return _data(copy, kind, **options)


def _data(image: Image.Image, kind: str, **options: int) -> str:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode()}"


def _details(report: Report) -> str:
    names = [name for name in COLUMNS if report.spread(name)]
    rows = [_means(report, prompt, names, prompt=prompt) for prompt in report.prompts()]
    rows += [_means(report, f"seed {seed}", names, seed=seed) for seed in report.seeds()]
    return _folded(report.title, _table(["", *names], rows))


def _means(report: Report, title: str, names: list[str], prompt: str | None = None, seed: int | None = None) -> str:
    cells = []
    for name in names:
        found = report.spread(name, prompt=prompt, seed=seed)
        deviation = f"<small>± {found.std:.3f}</small>" if found and name != DIVERSITY else ""
        cells.append(f"<td>{found.mean:.3f}{deviation}</td>" if found else "<td></td>")
    return f"<tr><td>{escape(title)}</td>{''.join(cells)}</tr>"


def _settings(report: Report) -> str:
    shown = report.settings | {"seconds to score an image": round(report.scoring_seconds, 4)}
    if report.generation_seconds:
        shown |= {"seconds to generate an image": round(report.generation_seconds, 4)}
    rows = [f"<tr><td>{escape(str(name))}</td><td>{escape(str(value))}</td></tr>" for name, value in shown.items()]
    return _folded(report.title, _table(["", ""], rows))


def _folded(title: str, body: str) -> str:
    return f'<details><summary>{escape(title)}</summary><div class="card">{body}</div></details>'
