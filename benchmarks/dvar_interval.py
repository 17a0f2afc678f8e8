"""How often must DVAR evaluate? TextBoost in the demo world, watched by DVAR at several intervals at once.

    python -m benchmarks.dvar_interval --checkpoint tiny.safetensors [--instances 0 1 2] [--intervals 4 6 8]

Each individual is trained once at full length; the monitors, its preset for TextBoost at other intervals, only record.
Printed per interval: the lowest ratio with its step, and the first steps below the preset's threshold and below .1.
"""

import argparse
import tempfile
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

import torch

from trainers.runs.run import Run
from trainers.runs.train import train
from trainers.stopping.dvar import PRESETS

from .fidelity import settings_of
from .fidelity_rows import concept_of, read_models, recipe
from .stopping import study

SETTINGS = ["views=128", "lora_learning_rate=0.001", "embedding_learning_rate=0.005"]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--instances", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--intervals", type=int, nargs="+", default=[4, 6, 8])
    parser.add_argument("--set", nargs="+", default=SETTINGS, metavar="NAME=VALUE", help="settings of the recipe")
    given = parser.parse_args()
    torch.set_num_threads(1)
    bench = study(given.checkpoint, settings_of(given.set), seed=0)
    preset = PRESETS["TextBoost"]
    monitors = tuple(replace(preset, every=every, stop_training=False) for every in given.intervals)
    for number in given.instances:
        run = Run(concept=concept_of(bench, number), recipe=recipe(bench, "textboost"), seed=0, stopper=monitors)
        with tempfile.TemporaryDirectory() as folder:
            history = train(run, read_models(bench), Path(folder) / "run", checkpoint_every=0).history
        ratios = defaultdict(list)
        for entry in history:
            for name, measured in entry.get("measures", {}).items():
                ratios[name].append((entry["step"], measured["ratio"]))
        for every, found in zip(given.intervals, ratios.values(), strict=True):
            step, lowest = min(found, key=lambda pair: pair[1])
            first = [next((at for at, ratio in found if ratio < limit), "-") for limit in (preset.threshold, 0.1)]
            print(
                f"individual {number}, every {every}: lowest {lowest:.4f} at {step}; below {preset.threshold}: "
                f"{first[0]}, below 0.1: {first[1]}",
                flush=True,
            )


if __name__ == "__main__":
    main()
