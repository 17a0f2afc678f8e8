"""Does stopping early save time and keep quality? Full runs with every monitor recording, in the demo world.

    python -m benchmarks.stopping --checkpoint tiny.safetensors --out DIR [--methods ...] [--instances 3] [--seeds 0 1]

One training of full length per method, individual and seed; DVAR and CLIP early stopping only record. What the model
has learned where each of them fires, at the length of the authors' short runs and at the end is copied, drawn and
scored afterwards, so that every row comes from one and the same training. Seconds of a row: the training's own and
those of the row's own monitor. With `--confirm` the first cells of each method are trained once more with each monitor
acting, and must end at the recorded step with the same bits. Lengths and windows are the paper's, scaled to the
world by each method's row below. Every cell is stored when it is done.
"""

import argparse
import json
import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from demo import captions, evaluators
from trainers.digest import digest_of
from trainers.metrics.extractor_cache import ExtractorCache
from trainers.runs.callbacks import Callbacks
from trainers.runs.run import Run
from trainers.runs.train import train
from trainers.stopping.clip_early_stopping import ClipEarlyStopping
from trainers.stopping.dvar import DVAR
from trainers.stopping.dvar import PRESETS as DVARS
from trainers.stopping.monitor import of_stage, reason_to_stop

from .fidelity import score, settings_of
from .fidelity_rows import PROMPTS, Bench, concept_of, generate, read_models, recipe

ALL = ("full", "short", "CLIP Early Stopping", "DVAR", "DVAR 2", "DVAR 3")


@dataclass(frozen=True, kw_only=True)
class Row:
    """A method scaled to the world.

    Attributes:
        method: a row of the fidelity study, whose length is the full one here.
        scale: full steps here by full steps of the paper; its other lengths are multiplied by the same.
        short: the authors' short run, in the paper's steps; 0 for none.
        dvar: the paper's window, or the one found here for methods it does not have, and its threshold.
        clip: CLIP early stopping's patience, eps and, in the paper's steps, the distance of its checks.
    """

    method: str
    scale: float
    short: int
    dvar: DVAR
    clip: ClipEarlyStopping

    def monitors(self) -> tuple:
        """Recording only: the second DVAR looks at every fourth step, the third at 512 samples spread over looks."""
        window = max(2, round(self.dvar.window * self.scale))
        dvar = replace(self.dvar, window=window, every=1, stop_training=False)
        clip = replace(self.clip, every=max(1, round(self.clip.every * self.scale)), stop_training=False)
        return dvar, replace(dvar, every=4), replace(dvar, accumulation=128, rotate_timesteps=True), clip


CLIP_FILE = "clip.safetensors"  # the world's CLIP, written into the study's folder
# A check draws 10 sampler steps, not the paper's 50 to 200: it is that much cheaper here than there.
CLIP = ClipEarlyStopping(sampler_steps=10, guidance=4.0, clip_model=evaluators.CLIP_NAME, clip_weights=CLIP_FILE)
ROWS = {
    "textual_inversion": Row(
        method="textual_inversion",
        scale=600 / 6100,
        short=475,
        dvar=DVARS["Textual Inversion"],
        clip=replace(CLIP, every=200),
    ),
    "dreambooth_lora": Row(
        method="dreambooth_lora",
        scale=300 / 1000,
        short=450,
        dvar=DVARS["DreamBooth-LoRA"],
        clip=replace(CLIP, patience=3, min_delta=0.04),
    ),
    "custom_diffusion": Row(
        method="custom_diffusion", scale=300 / 500, short=367, dvar=DVARS["Custom Diffusion"], clip=CLIP
    ),
    "textboost": Row(
        method="textboost",
        scale=1.0,
        short=0,
        dvar=DVARS["TextBoost"],
        clip=replace(CLIP, patience=3, min_delta=0.01, every=25),
    ),
    "attndreambooth": Row(
        method="attndreambooth",
        scale=1.0,
        short=0,
        dvar=DVARS["AttnDreamBooth 3"],
        clip=replace(CLIP, patience=3, min_delta=0.01, every=20, stage="3"),
    ),
}


class Copies:
    """What trains, copied at the first step where a monitor fires, and at one chosen step."""

    def __init__(self, models, monitors: tuple, short: int):
        self.models, self.monitors, self.short = models, monitors, short
        self.at: dict[str, tuple[int, dict[str, Tensor]]] = {}

    def __call__(self, entry: dict) -> None:
        if entry["stage_step"] == self.short:
            self.take("short", entry)
        for name, monitor in of_stage(self.monitors, entry["number"]).items():
            if name not in self.at and reason_to_stop(name, monitor, entry):
                self.take(name, entry)

    def take(self, name: str, entry: dict) -> None:
        self.at[name] = entry["step"], {key: p.detach().clone() for key, p in trained(self.models)}

    @torch.no_grad()
    def put(self, name: str) -> int:
        step, tensors = self.at[name]
        for key, parameter in trained(self.models):
            parameter.copy_(tensors[key])
        return step


def trained(models) -> list[tuple[str, Tensor]]:
    modules = {"unet": models.unet, **{f"text.{i}": encoder for i, encoder in enumerate(models.text_encoders)}}
    return [(f"{m}.{k}", p) for m, module in modules.items() for k, p in module.named_parameters() if p.requires_grad]


def digest(tensors: dict[str, Tensor]) -> str:
    return digest_of([tensors[key] for key in sorted(tensors)], sorted(tensors))


def cell(bench: Bench, metric_models, extractors: ExtractorCache, row: Row, number: int, folder: Path) -> dict:
    """One full training and all its rows."""
    models, chosen = read_models(bench), recipe(bench, row.method)
    copies = Copies(models, row.monitors(), round(row.short * row.scale))
    concept = concept_of(bench, number)
    run = Run(concept=concept, recipe=chosen, seed=bench.training_seed, stopper=row.monitors())
    result = train(
        run,
        models,
        folder / "run",
        checkpoint_every=0,
        callbacks=Callbacks(on_step=lambda report: copies(report.entry())),
        cache=folder.parent / "cache",
    )
    copies.take("full", result.history[-1])
    rows = {}
    for name in copies.at:
        step = copies.put(name)
        images = generate(bench, models, captions.with_article(chosen.subject(concept)))
        scores = {key: statistics.mean(values) for key, values in score(bench, metric_models, number, images).items()}
        seconds = cost(result.history[:step], name)
        rows[name] = {"step": step, **seconds, **scores, "bits": digest(copies.at[name][1])}
    return {"rows": rows, "ratios": ratios_differ(result.history, row), "look": looks(result.history)}


def cost(history: list[dict], name: str) -> dict:
    """Seconds of a training that only this monitor watches, up to the end of `history`, and its part of them."""
    own = {monitor: 0.0 for entry in history for monitor in entry.get("measures", {})}
    for entry in history:
        for monitor, measure in [*entry.get("measures", {}).items(), *entry.get("start", {}).items()]:
            own[monitor] += measure["seconds"]
    mine = own.get(name, 0.0)
    # The clock of a step stops before its own look.
    last = sum(m["seconds"] for m in history[-1].get("measures", {}).values())
    started = sum(m["seconds"] for entry in history for m in entry.get("start", {}).values())
    steps = history[-1]["seconds"] - (sum(own.values()) - last - started)
    return {"seconds": steps + mine, "monitor_seconds": mine}


def looks(history: list[dict]) -> dict[str, float]:
    """Median milliseconds of a look, and of a step without any."""
    found: dict[str, list[float]] = {}
    for entry in history:
        for name, measure in entry.get("measures", {}).items():
            found.setdefault(name, []).append(1000 * measure["seconds"])
    pairs = [(a, b) for a, b in zip(history, history[1:], strict=False) if a["stage"] == b["stage"]]
    between = [
        1000 * (b["seconds"] - a["seconds"] - sum(m["seconds"] for m in a.get("measures", {}).values()))
        for a, b in pairs
    ]
    return {"step": statistics.median(between)} | {name: statistics.median(values) for name, values in found.items()}


def ratios_differ(history: list[dict], row: Row) -> float:
    """The largest difference of the recorded ratios to numpy's over the recorded losses."""
    worst = 0.0
    for name, monitor in (("DVAR", row.monitors()[0]), ("DVAR 2", row.monitors()[1])):
        measures = [m[name] for e in history for m in (e.get("start", {}), e.get("measures", {})) if name in m]
        values, window = np.array([m["fixed_loss"] for m in measures]), monitor.window // monitor.every
        for n, measure in enumerate(measures, 1):
            expected = np.var(values[n - window : n]) / np.var(values[:n]) if n >= window else 1.0
            worst = max(worst, abs(measure["ratio"] - expected))
    return worst


def confirm(
    bench: Bench, extractors: ExtractorCache, row: Row, number: int, folder: Path, name: str, found: dict
) -> str:
    """Train once more with one monitor acting: it must end where it was recorded, with the same bits."""
    models = read_models(bench)
    place = ("DVAR", "DVAR 2", "DVAR 3", "CLIP Early Stopping").index(name)
    monitor = replace(row.monitors()[place], stop_training=True)
    run = Run(
        concept=concept_of(bench, number),
        recipe=recipe(bench, row.method),
        seed=bench.training_seed,
        stopper=(monitor,),
    )
    result = train(
        run,
        models,
        folder / f"confirm {name}",
        checkpoint_every=0,
        cache=folder.parent / "cache",
        extractors=extractors,
    )
    same = digest(dict(trained(models))) == found["bits"] and len(result.history) == found["step"]
    return f"ends at {len(result.history)}, recorded {found['step']}, bits {'identical' if same else 'DIFFERENT'}"


def study(checkpoint: Path, overrides: dict, seed: int) -> Bench:
    """How rows are drawn and scored: fewer images than the fidelity study, because there are more rows."""
    return Bench(
        checkpoint=checkpoint, prompts=tuple(PROMPTS)[:6], seeds=(0, 1), preset="benchmark", overrides=overrides,
        initializer="{colour} {subject}", training_seed=seed, sampler_steps=25, guidance=4.0, dtype="float32",
    )  # fmt: skip


def read(path: Path, make: Callable[[], dict]) -> dict:
    """A stored cell, or a new one."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(make(), indent=1))
    return json.loads(path.read_text())


def table(cells: dict[str, list[dict]]) -> str:
    lines = [
        "| method | row | fired | steps | seconds | of them monitor | identity | text |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for method, found in cells.items():
        for name in ALL:
            rows = [each["rows"][name] for each in found if name in each["rows"]]
            if rows:
                lines.append(
                    f"| {method} | {name} | {len(rows)} of {len(found)} | " + " | ".join(_columns(rows)) + " |"
                )
    return "\n".join(lines)


def costs(cells: dict[str, list[dict]]) -> str:
    """Milliseconds of a step and of a look, medians over the cells, and the ratios' distance to numpy's."""
    lines = ["| method | step, ms | " + " | ".join(f"{name}, ms" for name in ALL[2:]) + " | ratios off by |"]
    lines.append("|---" * (len(ALL[2:]) + 3) + "|")
    for method, found in cells.items():
        looks = [statistics.median(each["look"].get(name, math.nan) for each in found) for name in ("step", *ALL[2:])]
        worst = max(each["ratios"] for each in found)
        lines.append(f"| {method} | " + " | ".join(f"{value:.0f}" for value in looks) + f" | {worst:.1g} |")
    return "\n".join(lines)


def _columns(rows: list[dict]) -> list[str]:
    def column(key: str, digits: int) -> str:
        values = [row[key] for row in rows]
        error = f" ± {statistics.stdev(values) / len(values) ** 0.5:.{digits}f}" if len(values) > 1 else ""
        return f"{statistics.mean(values):.{digits}f}{error}"

    return [
        column(key, digits)
        for key, digits in (("step", 0), ("seconds", 0), ("monitor_seconds", 1), ("identity", 3), ("text", 3))
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--methods", nargs="+", default=[*ROWS], choices=ROWS)
    parser.add_argument("--instances", type=int, default=3)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--set", nargs="*", default=[], metavar="FIELD=VALUE")
    parser.add_argument("--confirm", type=int, default=0, help="cells of each method to train again with real stops")
    args = parser.parse_args()
    torch.set_num_threads(1)
    overrides = settings_of(args.set)
    metric_models = evaluators.load("cpu")
    cells: dict[str, list[dict]] = {}
    args.out.mkdir(parents=True, exist_ok=True)
    evaluators.expand_clip(evaluators.WEIGHTS / "evaluator_clip.safetensors", args.out / CLIP_FILE)
    extractors = ExtractorCache(folders=lambda: [args.out])
    for number in range(args.instances):
        for seed in args.seeds:
            bench = study(args.checkpoint, overrides, seed)
            for method in args.methods:
                row, folder = ROWS[method], args.out / method / f"{number:03d} {seed}"
                found = read(folder / "cell.json", lambda: cell(bench, metric_models, extractors, row, number, folder))  # noqa: B023
                cells.setdefault(method, []).append(found)
                print(
                    method,
                    number,
                    seed,
                    json.dumps(
                        {n: (r["step"], round(r["identity"], 3), round(r["text"], 3)) for n, r in found["rows"].items()}
                    ),
                    flush=True,
                )
                for name in found["rows"] if len(cells[method]) <= args.confirm else ():
                    if name not in ("full", "short"):
                        print(
                            "  confirmed:",
                            name,
                            confirm(bench, extractors, row, number, folder, name, found["rows"][name]),
                            flush=True,
                        )
    print(table(cells))
    print(costs(cells))


if __name__ == "__main__":
    main()
