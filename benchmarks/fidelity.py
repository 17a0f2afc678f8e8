"""Does a method learn the individual, and do prompts still work? Measured in the demo world.

    python -m benchmarks.fidelity --checkpoint tiny.safetensors --out DIR [--methods ...] [--instances 8]

Individuals nobody trained on, one reference image each; several prompts and seeds. What every row means stands in
README.md. Each (method, individual) is stored when it is done, so a run that was stopped goes on where it was. It
works on trainers/, without a host.
"""

import argparse
import json
import time
from dataclasses import asdict
from pathlib import Path

import torch
from PIL import Image

from demo import captions, evaluators

from . import fidelity_report
from .fidelity_rows import METHODS, PRESETS, PROMPTS, Bench, digest, draw, reference, unseen


def score(bench: Bench, metric_models, number: int, images: list) -> dict:
    """Every score of every image, in the order of prompts, then seeds.

    Text alignment never sees the details: class word only.
    """
    thing, near = unseen(number), [reference(number)]
    texts = [prompt.format(captions.with_article(thing.subject)) for prompt in bench.prompts for _ in bench.seeds]
    scores = {
        "identity": metric_models.identity(images, near),
        "identity_named": metric_models.identity_named(images, near),
        "identity_unnamed": metric_models.identity_unnamed(images, near),
        "clip_image": metric_models.clip_image(images, near),
        "text": metric_models.clip_text(images, texts),
    }
    scores = {name: [round(value, 5) for value in values.tolist()] for name, values in scores.items()}
    read = metric_models.attributes(images)
    for name in ("subject", "colour", "pattern", "extra", "extra_colour", "second"):
        if evaluators.visible(thing, name):
            scores[f"{name}_right"] = [float(found[name] == getattr(thing, name)) for found in read]
    return scores


def measure(bench: Bench, metric_models, method: str, number: int, out: Path, device: str):
    """One cell of the study. Images of the same settings are there already: then they are at most scored again."""
    cell, start = out / "cells" / method / f"{number:03d}", time.time()
    stored = fidelity_report.read(cell) or {}
    known = stored.get("settings") == bench.settings(method)
    extractor_weights = digest(*sorted(evaluators.WEIGHTS.glob("evaluator_*.safetensors")))
    if known and stored["judged_by"] == extractor_weights:
        return
    if known:
        images, facts = fidelity_report.unstrip(Image.open(cell / "pictures.png"))[1:], stored["facts"]
    else:
        images, facts = draw(bench, method, number, cell / "run", device)
        cell.mkdir(parents=True, exist_ok=True)
        fidelity_report.strip([reference(number), *images]).save(cell / "pictures.png")
    scores = score(bench, metric_models, number, images)
    record = {
        "settings": bench.settings(method),
        "judged_by": extractor_weights,
        "individual": asdict(unseen(number)),
        "facts": facts,
    }
    fidelity_report.write(cell, {**record, "scores": scores})
    text = " ".join(f"{name} {fidelity_report.mean(scores[name]):.3f}" for name in fidelity_report.COLUMNS)
    print(f"{method} {number} {unseen(number).subject} {text} ({time.time() - start:.0f} s)", flush=True)


def value(text: str):
    """A setting from the command line: JSON where it is JSON (numbers, true, false), else the text itself."""
    try:
        return json.loads(text)
    except ValueError:
        return text


def settings_of(pairs: list[str]) -> dict:
    """The settings that `NAME=VALUE ...` on the command line stands for."""
    return {name: value(text) for name, text in (pair.split("=", 1) for pair in pairs)}


def arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--checkpoint", type=Path, required=True, help="the demo's complete checkpoint (see demo/build.py)"
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for results; its finished cells are kept")
    parser.add_argument(
        "--methods",
        nargs="+",
        default=["untuned", "oracle", "real", "textboost"],
        metavar="METHOD",
        help=" ".join(METHODS),
    )
    parser.add_argument("--instances", type=int, default=8, help="unseen individuals, classes in turn")
    parser.add_argument("--first", type=int, default=0, help="number of the first one: choose rates on others")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3])
    parser.add_argument("--prompts", type=int, default=6, help="how many of the eight prompts")
    parser.add_argument("--preset", choices=PRESETS, default="benchmark")
    parser.add_argument(
        "--set", nargs="*", default=[], metavar="FIELD=VALUE", help="fields of the recipes, over the presets"
    )
    parser.add_argument(
        "--initializer", default="{subject}", help='words the new token starts from, such as "{colour} {subject}"'
    )
    parser.add_argument("--training-seed", type=int, default=0)
    parser.add_argument("--sampler-steps", type=int, default=25)
    parser.add_argument("--guidance", type=float, default=4.0)
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=0, help="0 leaves torch's own choice")
    return parser.parse_args()


def main():
    args = arguments()
    if args.threads:
        torch.set_num_threads(args.threads)
    bench = Bench(
        checkpoint=args.checkpoint,
        prompts=tuple(PROMPTS)[: args.prompts],
        seeds=tuple(args.seeds),
        preset=args.preset,
        overrides=settings_of(args.set),
        initializer=args.initializer,
        training_seed=args.training_seed,
        sampler_steps=args.sampler_steps,
        guidance=args.guidance,
        dtype=args.dtype,
    )
    metric_models = evaluators.load(args.device)
    numbers = range(args.first, args.first + args.instances)
    for number in numbers:
        for method in args.methods:
            measure(bench, metric_models, method, number, args.out, args.device)
    fidelity_report.report(args.out, args.methods, numbers, bench.settings())


if __name__ == "__main__":
    main()
