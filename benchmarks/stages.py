"""AttnDreamBooth's three stages: a step as it is here, and the same step written the straightforward way.

    python -m benchmarks.stages [--checkpoint tiny.safetensors] [--size 256 --batch 1 --steps 4]

Without a checkpoint: SD 1.5's shape with random weights. Straightforward is: explicit probabilities in self-attention,
too, and the autoencoder in every step; both in float32. Each stage and way is a process of its own, so that its peak
memory (of the whole process) is its own. Medians over the steps after the first.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch
from diffusers.models.attention_processor import AttnProcessor

from benchmarks.shapes import SHAPES, random_models
from benchmarks.step import GIB, peak_memory
from trainers.data.concept import Concept
from trainers.data.context import Context
from trainers.device import SingleDevice
from trainers.models.checkpoint import load_models
from trainers.models.diffusion import Models
from trainers.recipes.attndreambooth import PAPER
from trainers.training.loop import train_stage
from trainers.training.stage import Stage

WAYS = ("ours", "straightforward")


def models_of(args) -> Models:
    if args.checkpoint:
        from demo.build import HEADS, UNET

        return load_models(args.checkpoint, UNET, HEADS).to("cpu", torch.float32)
    return random_models(SHAPES["sd15"], torch.device("cpu"), torch.float32)


def measure(args) -> dict:
    """Milliseconds of the steps of one stage, and the process's peak memory."""
    models, number = models_of(args), args.stage
    small = {"run_stages": str(number), f"steps_{number}": args.steps, f"batch_size_{number}": args.batch}
    recipe = replace(PAPER, views=2 * args.batch, **small)
    concept = Concept(images=(torch.rand(3, args.size, args.size),), resolution=args.size)
    generator = torch.Generator().manual_seed(0)
    stages = recipe.stages(models, concept, generator, Context())
    stage = next(stages)  # the generator stays alive: it keeps the attention recorded
    if args.way == "straightforward":
        plainly(models, stage, args)
    else:
        models.encode_images = models.decode_latents = None  # nobody needs the autoencoder any more
    ends = [time.perf_counter()]

    def on_step(report, capture) -> None:
        ends.append(time.perf_counter())

    device = SingleDevice(device=torch.device("cpu"))
    train_stage(stage, models, device, generator, on_step=on_step)
    milliseconds = [1000 * (b - a) for a, b in zip(ends, ends[1:])]
    return {"ms": statistics.median(milliseconds[1:]), "peak": peak_memory(device.device) / GIB}


def plainly(models: Models, stage: Stage, args) -> None:
    """Explicit self-attention, and images encoded within the step."""
    for path, module in models.unet.named_modules():
        if path.endswith(".attn1"):
            module.processor = AttnProcessor()
    batches = stage.batches

    def encoding():
        for batch in batches:
            with torch.no_grad():
                models.encode_images(torch.rand(args.batch, 3, args.size, args.size))
            yield batch

    stage.batches = encoding()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", type=Path)
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--stage", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.stage:
        print(json.dumps(measure(args)))
        return
    print(
        "| stage | ours, ms | straightforward, ms | ours, GiB | straightforward, GiB |\n| --- | --- | --- | --- | --- |"
    )
    for stage in (1, 2, 3):
        command = [sys.executable, "-m", "benchmarks.stages", *sys.argv[1:], "--stage", str(stage), "--way"]
        ours, plain = (json.loads(subprocess.check_output([*command, way], text=True)) for way in WAYS)
        print(
            f"| {stage} | {ours['ms']:.0f} | {plain['ms']:.0f} | {ours['peak']:.2f} | {plain['peak']:.2f} |", flush=True
        )


if __name__ == "__main__":
    main()
