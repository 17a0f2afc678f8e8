"""Time and memory of one training step at a family's real shape, with random weights.

    python -m benchmarks.step [--family sdxl --preset 2026] [--size 512 --batch 1 --precision bfloat16] [--json FILE]

Prints the parts of a step in milliseconds (median over the steps after the first), the memory that the training took
beside the libraries, and what `trainers/training/memory.py` counts for it, part by part. It also counts the default
training (8 images at the family's own size, U-Net in bfloat16) with the memory plan that fits a common card. On a CPU
the default is one image of 256 px. Nothing is extrapolated; what is counted is called so.
The autoencoder and the teacher, which stay out of the step, are timed beside it and gone when memory is measured.
"""

import argparse
import gc
import json
import platform
import statistics
import time
from collections import defaultdict
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import peft  # noqa: F401, loaded before memory is measured
import torch

from benchmarks.shapes import SHAPES, Shape, random_models
from trainers.data.concept import Concept
from trainers.data.context import Context
from trainers.device import SingleDevice
from trainers.models.diffusion import Models
from trainers.models.tokenizer import bundled_words
from trainers.recipes import textboost, textboost_2026
from trainers.training.loop import train_stage
from trainers.training.memory import MemoryPlan, fit, stage_bytes
from trainers.training.stage import freeze_all_but

PRESETS = {"benchmark": textboost.BENCHMARK, "2026": textboost_2026.REVISED, "2026++": textboost_2026.PLUS}
CAPTIONS = ("a red ball on a table", "two cats", "an old house")  # few, so that the teacher is done soon
GIB = 2**30


class Clock:
    """Milliseconds by part, waiting for the device at both ends of each."""

    def __init__(self, device: torch.device):
        self.device, self.parts = device, defaultdict(list)

    def now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() * 1000

    @contextmanager
    def part(self, name: str):
        start = self.now()
        yield
        self.parts[name].append(self.now() - start)

    def timed(self, name: str, function):
        def call(*args, **kwargs):
            with self.part(name):
                return function(*args, **kwargs)

        return call

    def batches(self, batches):
        while True:
            with self.part("batch"):
                batch = next(batches)
            yield batch


class TimedDevice(SingleDevice):
    """The loop's own device, on the clock."""

    clock: Clock

    def backward(self, loss):
        with self.clock.part("backward"):
            super().backward(loss)

    def step(self, optimizer):
        with self.clock.part("optimizer"):
            super().step(optimizer)


def measure(args, device: torch.device, dtype: torch.dtype) -> Clock:
    """Times on the clock, and its `counts` and `measured` memory in bytes."""
    bundled_words()
    libraries, shape = memory_now(device), SHAPES[args.family]
    models = random_models(shape, device, dtype)
    recipe = replace(PRESETS[args.preset], steps=args.steps + 1, batch_size=args.batch, views=2 * args.batch)
    if args.preset == "benchmark":
        recipe = replace(recipe, captions=CAPTIONS, templates="plain")
    concept = Concept(images=(torch.rand(3, args.size, args.size),), resolution=args.size)
    clock, generator = Clock(device), torch.Generator().manual_seed(0)
    models.encode_images = clock.timed("autoencoder, per batch (ahead)", models.encode_images)
    stage = next(recipe.stages(models, concept, generator, Context()))
    freeze_all_but(stage, models)
    memory_plan = MemoryPlan(micro_batch_size=args.split, gradient_checkpointing=args.checkpointing)
    trained = sum(p.numel() for p in stage.parameters())
    clock.counts = {
        f"{args.batch} x {args.size} px, {args.precision}, {memory_plan.words(args.batch)}": counted(
            models, memory_plan, trained=trained, batch_size=args.batch, resolution=args.size
        ),
        **default_training(models, shape, trained),
    }
    models.save_memory(args.checkpointing)
    ids = models.tokenize(["a photo of a dog"] * args.batch).to(device)
    for _ in range(2):
        with torch.no_grad(), clock.part("teacher, per batch (ahead)"):
            models.encode_ids(ids)
    models.encode_images = models.decode_latents = None  # the last to hold the autoencoder
    stage.batches = clock.batches(stage.batches)
    models.encode_ids = clock.timed("text encoder forward", models.encode_ids)
    models.predict = clock.timed("U-Net forward", models.predict)
    timed = TimedDevice(device=device, dtype=dtype)
    timed.clock = clock
    gc.collect()
    reset_peak(device)
    ends = [clock.now()]

    def on_step(report, capture) -> None:
        ends.append(clock.now())

    train_stage(stage, models, timed, generator, micro_batch_size=args.split, on_step=on_step)
    clock.parts["whole step"] = [b - a for a, b in zip(ends, ends[1:])]
    clock.measured = peak_memory(device) - libraries
    return clock


def counted(models: Models, memory_plan: MemoryPlan, *, trained: int, **size: int) -> dict[str, int]:
    """Bytes that a device must hold during a training, by part and in total."""
    parts = {
        "U-Net": weight_bytes(models.unet),
        "text encoders": sum(map(weight_bytes, models.text_encoders)),
        "trained, gradients, moments": 16 * trained,
        "activations, margin, base": stage_bytes(models, memory_plan, trained=trained, **size) - 12 * trained,
    }
    return parts | {"sum": sum(parts.values())}


def default_training(models: Models, shape: Shape, trained: int) -> dict[str, dict[str, int]]:
    """The same for 8 images of the family's size, U-Net in bfloat16, with the least effort that fits the card."""
    with torch.device("meta"):
        unet = type(models.unet).from_config(models.unet.config)
    torch.nn.Module.to(unet, dtype=torch.bfloat16).requires_grad_(False).eval()
    models = replace(models, unet=unet)
    size = {"trained": trained, "batch_size": 8, "resolution": models.resolution}
    weights = counted(models, MemoryPlan(), **size)
    weights = weights["U-Net"] + weights["text encoders"] + 4 * trained
    try:
        memory_plan, _ = fit(models, MemoryPlan(), shape.card * GIB - weights, **size)
    except MemoryError:
        memory_plan = MemoryPlan(micro_batch_size=1, gradient_checkpointing=True)
    title = f"8 x {models.resolution} px, bfloat16, {memory_plan.words(8)}, for {shape.card} GiB"
    return {title: counted(models, memory_plan, **size)}


def weight_bytes(module: torch.nn.Module) -> int:
    """Bytes of a module's frozen tensors; tensors that share memory count once."""
    tensors = [t for t in (*module.parameters(), *module.buffers()) if not t.requires_grad]
    return sum({t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}.values())


def memory_now(device: torch.device) -> int:
    """Bytes: what the GPU's allocator holds, or the process's resident size (Linux)."""
    return torch.cuda.memory_allocated() if device.type == "cuda" else _status("VmRSS")


def peak_memory(device: torch.device) -> int:
    """The most of that since `reset_peak`."""
    return torch.cuda.max_memory_allocated() if device.type == "cuda" else _status("VmHWM")


def reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(name)).split()[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    cuda = torch.cuda.is_available()
    parser.add_argument("--family", choices=SHAPES, default="sd15")
    parser.add_argument("--preset", choices=PRESETS, default="benchmark")
    parser.add_argument("--size", type=int, default=512 if cuda else 256)
    parser.add_argument("--batch", type=int, default=8 if cuda else 1)
    parser.add_argument(
        "--precision", choices=("float32", "bfloat16", "float16"), default="bfloat16" if cuda else "float32"
    )
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--split", type=int, default=0, help="pictures at once; 0 = the whole batch")
    parser.add_argument("--checkpointing", action="store_true", help="compute activations twice")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    device = torch.device("cuda" if cuda else "cpu")
    where = torch.cuda.get_device_name() if cuda else f"{platform.processor() or platform.machine()} CPU"
    clock = measure(args, device, getattr(torch, args.precision))
    medians = {name: statistics.median(times[1:] or times) for name, times in clock.parts.items()}
    threads = "" if cuda else f", {torch.get_num_threads()} thread(s)"
    shape = f"{SHAPES[args.family].family.name} shape ({args.family})"
    print(f"Preset {args.preset}, {shape}, {args.batch} x {args.size} px, {args.precision}, {where}{threads}")
    for name, milliseconds in medians.items():
        print(f"  {name:32} {milliseconds:10.1f} ms")
    for title, parts in clock.counts.items():
        print(f"Counted: {title}")
        for name, size in parts.items():
            print(f"  {name:32} {size / GIB:10.2f} GiB")
    print(f"Measured, the libraries not included\n  {'peak memory':32} {clock.measured / GIB:10.2f} GiB")
    if args.json:
        rest = {"where": where, "ms": medians, "counted": clock.counts, "measured": clock.measured}
        args.json.write_text(json.dumps({**vars(args), "json": None, **rest}, indent=2))


if __name__ == "__main__":
    main()
