"""Does a training that is killed again and again end as if nothing had happened?

    python -m benchmarks.survival --checkpoint tiny.safetensors --out DIR [--kills 20]

A process trains the tiny model and is killed (SIGKILL) at a random moment; another goes on in its folder; and so on
until the given number of kills. Every run that gets to its end is compared bit for bit with one that was left alone.
Needs fork, so Linux or macOS.
"""

import argparse
import json
import multiprocessing
import os
import random
import shutil
import signal
import time
from pathlib import Path

import torch
from safetensors.torch import load_file

from demo import build, world
from trainers.data.concept import Concept
from trainers.models.checkpoint import load_models
from trainers.recipes.textboost import TextBoost
from trainers.runs.run import Run
from trainers.runs.train import train

RECIPE = TextBoost(steps=40, batch_size=4, views=32)


def learn(checkpoint: Path, folder: Path) -> None:
    """One process: trains to the end unless it is killed."""
    torch.set_num_threads(1)
    dog = world.instance(world.TEST_SEEDS[0], "dog")
    tiles = world.draw(dog, world.reference_scene(), random.Random(0))
    pixels = torch.from_numpy(tiles).permute(2, 0, 1).float().div(255).repeat_interleave(8, 1).repeat_interleave(8, 2)
    run = Run(concept=Concept(images=(pixels,), resolution=128), recipe=RECIPE)
    train(run, load_models(checkpoint, build.UNET, heads=build.HEADS), folder, checkpoint_every=5)


def killed_after(seconds: float, *args) -> bool:
    """Whether the process was killed before it ended by itself."""
    process = multiprocessing.get_context("fork").Process(target=learn, args=args)
    process.start()
    process.join(seconds)
    if process.is_alive():
        os.kill(process.pid, signal.SIGKILL)
    process.join()
    if process.exitcode not in (0, -signal.SIGKILL):
        raise RuntimeError(f"the training ended with status {process.exitcode}")
    return process.exitcode != 0


def learned(folder: Path) -> dict:
    """All that a run learned, as bytes, and its losses."""
    files = [load_file(folder / f"{name}.safetensors") for name in ("lora", "clip", "last")]
    losses = [json.loads(line)["loss"] for line in (folder / "steps.jsonl").read_text().splitlines()]
    return {"losses": losses} | {key: value.numpy().tobytes() for file in files for key, value in file.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    shutil.rmtree(args.out, ignore_errors=True)
    started = time.perf_counter()
    killed_after(3600, args.checkpoint, args.out / "whole" / "run")
    whole, seconds = learned(args.out / "whole" / "run"), time.perf_counter() - started
    print(f"undisturbed: {len(whole['losses'])} steps in {seconds:.1f} s")
    rng, kills, runs = random.Random(args.seed), 0, 0
    while kills < args.kills:
        runs += 1
        folder = args.out / f"killed_{runs}" / "run"
        while killed_after(rng.uniform(0, seconds) if kills < args.kills else 3600, args.checkpoint, folder):
            kills += 1
            saved = sorted(file.stem for file in (folder / "checkpoints").glob("*.safetensors"))
            print(f"kill {kills}: {', '.join(saved) or 'nothing saved yet'}", flush=True)
        if learned(folder) != whole:
            raise SystemExit(f"run {runs} differs from the undisturbed one")
        print(f"run {runs} ended: every bit equal", flush=True)
    print(f"{kills} kills, {runs} runs, all bit-identical")


if __name__ == "__main__":
    main()
