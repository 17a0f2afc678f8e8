"""Does Pick by Score return what it promises? Its picks, scored on prompts and noise that it did not score, in the demo
world.

    python -m benchmarks.picking --checkpoint tiny.safetensors --out DIR [--methods ...] [--instances 3]

One training per method and individual, scored every 25 steps on three prompts. The state that each preference picks,
and the last one, is drawn and scored on six other prompts. Every cell is stored when it is done.
"""

import argparse
import json
import statistics
from pathlib import Path

import torch

from demo import captions, evaluators
from trainers.metrics.extractor_cache import ExtractorCache
from trainers.runs import restore
from trainers.runs.folder import RunFolder
from trainers.runs.pick import candidates, preferred
from trainers.runs.run import Run
from trainers.runs.train import train
from trainers.stopping.pick_by_score import PickByScore

from .fidelity import score, settings_of
from .fidelity_rows import Bench, concept_of, generate, read_models, recipe
from .stopping import CLIP_FILE, read, study

METHODS = ("textboost", "dreambooth_lora", "attndreambooth")
PREFERENCES = (0.0, 0.25, 0.5, 0.75, 1.0)
ENCODER = "encoder.safetensors"  # the world's instance encoder, in the place of a DINO
SCORED = "a photo of a {} on water\na photo of a {} on grass, on the left\na painting of a {} on water"
PICKER = PickByScore(
    every=25, prompts=SCORED, seeds=2, sampler_steps=15, guidance=4.0, first_seed=100,
    clip_model=evaluators.CLIP_NAME, clip_weights=CLIP_FILE, dino_model=evaluators.ENCODER_NAME, dino_weights=ENCODER,
)  # fmt: skip


def cell(bench: Bench, metric_models, extractors: ExtractorCache, method: str, number: int, folder: Path) -> dict:
    """One training and the rows of its picks; a state that two preferences pick is drawn once."""
    models, chosen, concept = read_models(bench), recipe(bench, method), concept_of(bench, number)
    run = Run(concept=concept, recipe=chosen, seed=bench.training_seed, stopper=(PICKER,))
    result = train(
        run, models, folder / "run", checkpoint_every=0, cache=folder.parent / "cache", extractors=extractors
    )
    steps = {f"{weight:g}": preferred(result.history, weight).step for weight in PREFERENCES}
    steps["last"] = 0
    subject = captions.with_article(chosen.subject(concept))
    scored = {
        step: scores_of(bench, metric_models, folder / "run", step, number, subject) for step in {*steps.values()}
    }
    looks = [entry["measures"][PickByScore.name]["seconds"] for entry in result.history if "measures" in entry]
    return {
        "rows": {name: {"step": step or len(result.history), **scored[step]} for name, step in steps.items()},
        "candidates": [[each.step, each.identity, each.text] for each in candidates(result.history)],
        "seconds": result.seconds,
        "scoring_seconds": sum(looks),
    }


def scores_of(bench: Bench, metric_models, folder: Path, step: int, number: int, subject: str) -> dict:
    """A state as it lies in the run's folder, in fresh models, scored."""
    models = read_models(bench).to("cpu", getattr(torch, bench.dtype))
    restore.put(RunFolder(folder).result(step=step), models)
    images = generate(bench, models, subject)
    return {key: statistics.mean(values) for key, values in score(bench, metric_models, number, images).items()}


def table(cells: dict[str, list[dict]]) -> str:
    lines = ["| method | text_weight | step | identity | text | scoring, of the seconds |", "|---|---|---|---|---|---|"]
    for method, found in cells.items():
        spent = sum(each["scoring_seconds"] for each in found) / sum(each["seconds"] for each in found)
        for name in (*(f"{weight:g}" for weight in PREFERENCES), "last"):
            rows = [each["rows"][name] for each in found]
            means = [f"{statistics.mean(row[key] for row in rows):.3f}" for key in ("identity", "text")]
            steps = ", ".join(str(row["step"]) for row in rows)
            lines.append(f"| {method} | {name} | {steps} | {' | '.join(means)} | {spent:.0%} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--methods", nargs="+", default=METHODS, choices=METHODS)
    parser.add_argument("--instances", type=int, default=3)
    parser.add_argument("--set", nargs="*", default=[], metavar="FIELD=VALUE")
    args = parser.parse_args()
    torch.set_num_threads(1)
    overrides = settings_of(args.set)
    bench, metric_models = study(args.checkpoint, overrides, seed=0), evaluators.load("cpu")
    args.out.mkdir(parents=True, exist_ok=True)
    evaluators.expand_clip(evaluators.WEIGHTS / "evaluator_clip.safetensors", args.out / CLIP_FILE)
    (args.out / ENCODER).write_bytes((evaluators.WEIGHTS / "evaluator_instance.safetensors").read_bytes())
    extractors = ExtractorCache(folders=lambda: [args.out])
    cells: dict[str, list[dict]] = {}
    for number in range(args.instances):
        for method in args.methods:
            folder = args.out / method / f"{number:03d}"
            found = read(folder / "cell.json", lambda: cell(bench, metric_models, extractors, method, number, folder))  # noqa: B023
            cells.setdefault(method, []).append(found)
            rows = {
                name: (row["step"], round(row["identity"], 3), round(row["text"], 3))
                for name, row in found["rows"].items()
            }
            print(method, number, json.dumps(rows), flush=True)
    print(table(cells))


if __name__ == "__main__":
    main()
