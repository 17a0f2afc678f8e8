"""What a training step costs on this GPU and where its time goes, at SD 1.5's shape with random weights. One table.

python benchmarks/gpu/steps.py --out OUT --budget 200           on a GPU, from the repository's root
python benchmarks/gpu/steps.py --out OUT --budget 200 --tiny    the same code on a CPU, to test it
"""

import argparse
import contextlib
import gc
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from dataclasses import replace
from functools import partial
from pathlib import Path

sys.path.insert(0, os.getcwd())

import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import shapes
from trainers.data.concept import Concept
from trainers.data.context import Context
from trainers.device import SingleDevice
from trainers.models import sampler
from trainers.models.checkpoint import SD1_UNET
from trainers.models.families import SD1
from trainers.models.tokenizer import bundled_words
from trainers.recipes import METHODS
from trainers.runs.callbacks import Callbacks
from trainers.runs.run import Run
from trainers.runs.train import train
from trainers.stopping import dvar
from trainers.stopping.monitor import StageContext
from trainers.training.loop import forward_backward, train_stage
from trainers.training.objective import Objective
from trainers.training.optimizers import optimizer_of
from trainers.training.stage import freeze_all_but

BEGAN = time.perf_counter()
CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda:0" if CUDA else "cpu")
DTYPE = torch.bfloat16 if CUDA else torch.float32
ROWS, FOUND = [], {}


class Enough(Exception):
    """Ends a training that was long enough to be measured."""


def row(name, value, note=""):
    ROWS.append((name, value, note))
    print(f"  {name:62} {value:>16}  {note}", flush=True)


@contextlib.contextmanager
def section(name):
    """An error is noted, and the rest goes on."""
    gc.collect()  # what an error before left in cycles
    start = time.perf_counter()
    print(f"## {name} ({ARGS.budget - (start - BEGAN):.0f} s left)", flush=True)
    try:
        yield
    except Exception as error:  # whatever breaks on a card nobody has seen
        FOUND.setdefault("errors", {})[name] = f"{type(error).__name__}: {error}"[:600]
        traceback.print_exc(limit=8)
        if error.__context__ is not None:  # what a sentence for users replaced
            traceback.print_exception(error.__context__, limit=8)
    finally:
        FOUND.setdefault("seconds", {})[name] = round(time.perf_counter() - start, 1)
        gc.collect()
        if CUDA:
            torch.cuda.empty_cache()


def sync():
    if CUDA:
        torch.cuda.synchronize()


def median_ms(call, n=10, warm=3):
    """Milliseconds of a call, each with a wait for the device at its end."""
    for _ in range(warm):
        call()
    times = []
    for _ in range(n):
        sync()
        start = time.perf_counter()
        call()
        sync()
        times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times)


def peak():
    return torch.cuda.max_memory_allocated() / 2**30 if CUDA else 0.0


# ---------------------------------------------------------------------------------------------------------------------
# What is measured


def build(family="sd15"):
    shape = shapes.SHAPES[family]
    if ARGS.tiny:
        unet = {**SD1_UNET, "model_channels": 32, "num_heads": 4, "context_dim": 64}
        shape = shapes.Shape(family=SD1, unet=unet, text_encoders=((64, 2),), card=6)
    torch.manual_seed(0)
    bundled_words()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        models = shapes.random_models(shape, DEVICE, DTYPE)
    if ARGS.tiny:  # the real autoencoder takes minutes on a CPU
        models.encode_images = average
        models.decode_latents = lambda latents: torch.nn.functional.interpolate(latents[:, :3].float(), scale_factor=8)
    for module in (models.unet, *(encoder.module for encoder in models.text_encoders)):
        for parameter in module.parameters():  # random weights of PyTorch's own size overflow
            if parameter.dim() > 1:
                parameter.data.mul_(0.7)
    return models


def average(pixels):
    mean = torch.nn.functional.avg_pool2d(pixels.float(), 8)
    mean = torch.cat([mean, mean.mean(dim=1, keepdim=True)], dim=1)
    return mean, torch.full_like(mean, 0.01)


def concept():
    return Concept(images=(torch.rand(3, ARGS.size, ARGS.size),), resolution=ARGS.size)


def recipes():
    """Name -> recipe, and the number of the stage that is measured."""
    batch, views = ARGS.batch, 2 * ARGS.batch
    long = {"steps": 10_000, "batch_size": batch, "views": views}
    stages = {f"{name}_{n}": value for n in (1, 2, 3) for name, value in (("steps", 10_000), ("batch_size", batch))}
    paper = replace(METHODS["AttnDreamBooth"]["paper"], views=views, **stages)
    textboost = METHODS["TextBoost"]
    return {
        "textboost": (replace(textboost["benchmark"], captions=("a red ball", "two cats"), **long), 1),
        "2026++": (replace(textboost["2026++"], **long), 1),
        **{f"attndreambooth {n}": (paper, n) for n in (1, 2, 3)},
        "attndreambooth lora 3": (replace(paper, fine_tuning="lora"), 3),
        "dreambooth_lora": (replace(METHODS["DreamBooth-LoRA"]["full"], **long), 1),
    }


@contextlib.contextmanager
def stage_of(name):
    """Models, the stage that is measured, and the run's generator."""
    models, generator = build().to(DEVICE, DTYPE), torch.Generator().manual_seed(0)
    recipe, number = recipes()[name]
    stages = recipe.stages(models, concept(), generator, Context())
    for _ in range(number):
        stage = next(stages)
    freeze_all_but(stage, models)
    try:
        yield models, stage, generator
    finally:
        stages.close()


def timed(models, stage, generator, graph=True):
    """Median milliseconds of the product's own loop, without a wait that it does not make itself, and what it said."""
    ends, said = [], []

    def on_step(report, capture):
        ends.append(time.perf_counter())
        if len(ends) > ARGS.steps + 4:
            raise Enough

    device = SingleDevice(device=DEVICE, dtype=DTYPE, graph=graph)
    if CUDA:
        torch.cuda.reset_peak_memory_stats()
    with contextlib.suppress(Enough):
        train_stage(stage, models, device, generator, on_step=on_step, notice=said.append)
    sync()
    for parameter in stage.parameters():
        parameter.grad = None
    return statistics.median(1e3 * (b - a) for a, b in zip(ends[4:], ends[5:])), "; ".join(said)


def ceilings():
    n = 8192 if CUDA else 256
    a, b = (torch.randn(n, n, device=DEVICE, dtype=DTYPE) for _ in "ab")
    FOUND["tflops"] = 2 * n**3 / median_ms(lambda: a @ b) / 1e9
    row("matrix product, TFLOP/s", f"{FOUND['tflops']:.0f}", f"{n} cubed, {DTYPE}")


def loops():
    """Each method's loop: with a CUDA graph, kernel by kernel, and its FLOPs counted."""
    for name in recipes():
        with section(f"loop {name}"), stage_of(name) as (models, stage, generator):
            eager, _ = timed(models, stage, generator, graph=False)
            eager_peak = peak()
            ms, said = timed(models, stage, generator)
            top = peak()
            objective = Objective(models, {n: loss for n, (_, loss) in stage.losses.items()})
            device = SingleDevice(device=DEVICE, dtype=DTYPE)
            with FlopCounterMode(display=False) as flops:
                forward_backward(stage, objective, device, generator, 0)
            tflop = flops.get_total_flops() / 1e12
            share = 100 * tflop / ms * 1e3 / FOUND["tflops"]
            FOUND[f"loop {name}"] = dict(ms=ms, eager=eager, tflop=tflop, peak=top, share=share)
            note = f"kernel by kernel {eager:.1f}; {tflop:.2f} TFLOP, {share:.0f} % of the product"
            note += f"; peak {top:.2f} GiB, kernel by kernel {eager_peak:.2f}; {said}"
            row(f"{name}, {ARGS.batch} x {ARGS.size}: ms per step", f"{ms:.1f}", note)
            if name == "textboost":
                profile(stage, generator, objective, device)
                waits(stage, generator, objective, device)
                monitor(models, stage, generator)
                preview(models)


def profile(stage, generator, objective, device):
    """Kernels of a step that is launched kernel by kernel, in groups."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiled

    optimizer = optimizer_of(stage.params, stage.optimization)

    def step():
        forward_backward(stage, objective, device, generator, 0)
        device.step(optimizer)

    step()
    sync()
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if CUDA else [])]
    with profiled(activities=activities, record_shapes=True) as found:
        step()
        sync()
    with (ARGS.out / "profile.txt").open("w") as file:  # for whoever looks for the next millisecond
        by_shape = found.key_averages(group_by_input_shape=True)
        for averages in (found.key_averages(), by_shape):
            print(averages.table(sort_by="self_device_time_total", row_limit=70, max_name_column_width=90), file=file)
    kernels = [e for e in found.key_averages() if str(getattr(e, "device_type", "")).endswith("CUDA")]
    sums, groups = {}, {
        "layout": ("nchwtonhwc", "nhwctonchw"), "attention": ("flash", "fmha", "attention", "sdpa"),
        "norms": ("norm", "moments"), "convolution": ("conv", "implicit", "dgrad", "wgrad"),
        "matrix products": ("gemm", "nvjet", "cutlass", "cublas"), "copies": ("copy", "memcpy", "memset", "cat"),
    }  # fmt: skip
    for each in kernels:
        kind = next((g for g, words in groups.items() if any(w in each.key.lower() for w in words)), "elementwise")
        sums[kind] = sums.get(kind, 0.0) + each.self_device_time_total / 1e3
    count = sum(e.count for e in kernels if "Memcpy" not in e.key and "Memset" not in e.key)
    FOUND["profile"] = dict(kernels=count, ms=sums)
    parts = ", ".join(f"{kind} {ms:.1f}" for kind, ms in sums.items())
    row("textboost step: ms with a kernel running", f"{sum(sums.values()):.1f}", f"{count} kernels; {parts}")


def waits(stage, generator, objective, device):
    """Where a step makes the processor wait for the card."""
    if not CUDA:
        return
    found, shown = {}, warnings.showwarning

    def show(message, category, filename, lineno, file=None, line=None):
        stack = [f for f in traceback.extract_stack() if "/trainers/" in f.filename]
        where = " < ".join(f"{Path(f.filename).name}:{f.lineno}" for f in stack[-2:][::-1])
        found[where] = found.get(where, 0) + 1

    optimizer = optimizer_of(stage.params, stage.optimization)
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("always")
            warnings.showwarning = show
            forward_backward(stage, objective, device, generator, 0)
            device.step(optimizer)
            stage.after_step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
        warnings.showwarning = shown
    row("waits in a textboost step", str(sum(found.values())), ", ".join(f"{k} x {v}" for k, v in found.items()))


def monitor(models, stage, generator):
    context = StageContext(
        models=models, stage=stage, concept=concept(), device=SingleDevice(device=DEVICE, dtype=DTYPE),
        generator=generator, subject="<concept>",
    )  # fmt: skip
    preset = dvar.PRESETS["TextBoost"]
    evaluate = dvar.FixedBatch(preset, context)
    with torch.no_grad():
        ms = median_ms(lambda: evaluate(1, only=0), n=8)
    share = 100 * ms / preset.every / FOUND["loop textboost"]["ms"]
    row(
        "DVAR: one evaluation of 4 images, ms", f"{ms:.1f}", f"every {preset.every}th step: {share:.0f} % of a training"
    )


def preview(models):
    def generate():
        with SingleDevice(device=DEVICE, dtype=DTYPE).autocast():
            prompts = ["a photo of a dog", "a painting of a dog"]
            sampler.sample(models, prompts, [0, 0], size=(ARGS.size,) * 2, steps=20)

    row("a preview: 2 images, 20 steps, guided, ms", f"{median_ms(generate, n=2, warm=1):.0f}")


def end_to_end():
    """A whole TextBoost training as Train starts it, the models in memory: 250 steps of 8, 512 views, no previews."""
    steps, views = (4, 16) if ARGS.tiny else (250, 512)
    recipe = replace(METHODS["TextBoost"]["benchmark"], steps=steps, views=views, batch_size=ARGS.batch)
    run, said = Run(concept=concept(), recipe=recipe, dtype=DTYPE), []
    models = build()
    if CUDA:
        torch.cuda.reset_peak_memory_stats()
    free = (lambda: torch.cuda.mem_get_info()[0]) if CUDA else None
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        callbacks = Callbacks(
            on_notice=lambda sentence: said.append(f"{time.perf_counter() - start:.1f} s: {sentence}")
        )
        result = train(run, models, Path(folder) / "run", device=DEVICE, free_memory=free, callbacks=callbacks)
        sync()
        total = time.perf_counter() - start
    FOUND["end to end"] = dict(seconds=total, steps=result.seconds, said=said, peak=peak())
    note = f"of them steps {result.seconds:.1f}; peak {peak():.2f} GiB; {'; '.join(said)}"
    row(f"TextBoost, {steps} steps of {ARGS.batch}, end to end, s", f"{total:.1f}", note)


SMALL_CARDS = (
    ("sd15", 512, 5, "TextBoost", "benchmark"),
    ("sdxl", 1024, 11, "TextBoost", "benchmark"),
    ("sdxl", 1024, 11, "DreamBooth-LoRA", "full"),
)


def small_cards():
    """Each in a process of its own, which begins with an empty card."""
    for number, card in enumerate(SMALL_CARDS):
        with section(f"{card[3]} of {card[0]} in {card[2]} GiB"):
            left = ARGS.budget - (time.perf_counter() - BEGAN)
            out = ARGS.out / f"card_{number}"
            command = [sys.executable, __file__, "--out", out, "--card", str(number)]
            subprocess.run([*command, *(["--tiny"] if ARGS.tiny else [])], timeout=max(left, 20), check=True)
            found = json.loads((out / "steps.json").read_text())
            ROWS.extend(found["rows"])
            FOUND.setdefault("errors", {}).update(found.get("errors", {}))


def small_card(family, size, limit, method, preset):
    """A training as Train starts it, where this process may take no more memory than a small card has."""
    family, size = ("sd15", 64) if ARGS.tiny else (family, size)
    recipe = replace(METHODS[method][preset], steps=5, views=8, batch_size=ARGS.batch)
    subject = Concept(images=(torch.rand(3, size, size),), resolution=size)
    run = Run(concept=subject, recipe=recipe, dtype=DTYPE)
    said, ends, models = [], [], build(family)
    if CUDA:
        torch.cuda.empty_cache()
        torch.cuda.set_per_process_memory_fraction(limit * 2**30 / torch.cuda.mem_get_info()[1])
        torch.cuda.reset_peak_memory_stats()
    free = (lambda: limit * 2**30 - torch.cuda.memory_allocated()) if CUDA else None
    callbacks = Callbacks(on_notice=said.append, on_step=lambda report: ends.append(time.perf_counter()))
    with tempfile.TemporaryDirectory() as folder:
        train(run, models, Path(folder) / "run", device=DEVICE, free_memory=free, callbacks=callbacks)
    pace = statistics.median(1e3 * (b - a) for a, b in zip(ends, ends[1:]))
    note = "; ".join(sentence for sentence in said if "memory" in sentence)
    name = f"{family}, {method}, {ARGS.batch} x {size} in {limit} GiB: ms per step"
    row(name, f"{pace:.0f}", f"peak {peak():.2f} GiB; {note}")


def repeatable():
    """The same run twice, and once interrupted in the middle: how far apart on this device?"""
    recipe = replace(METHODS["TextBoost"]["benchmark"], steps=6, batch_size=2, views=4, captions=("a red ball",))
    pixels = torch.rand(3, ARGS.size, ARGS.size, generator=torch.Generator().manual_seed(0))
    run = Run(concept=Concept(images=(pixels,), resolution=ARGS.size), recipe=recipe, dtype=DTYPE)

    def trained(folder, stop=0):
        def on_step(report):
            if report.step == stop:
                raise Enough

        with contextlib.suppress(Enough):
            callbacks = Callbacks(on_step=on_step)
            return train(run, build(), folder, device=DEVICE, checkpoint_every=2, callbacks=callbacks)

    def apart(a, b):
        return max((a.lora[key] - b.lora[key]).abs().max().item() for key in a.lora)

    with tempfile.TemporaryDirectory() as folder:
        one, two = trained(Path(folder) / "1"), trained(Path(folder) / "2")
        trained(Path(folder) / "3", stop=3)
        resumed = trained(Path(folder) / "3")
    largest = max(value.abs().max().item() for key, value in one.lora.items() if "lora_up" in key)
    note = f"resumed {apart(one, resumed):.1e}; largest value of B {largest:.1e}"
    row("the same run twice, largest difference of the LoRA", f"{apart(one, two):.1e}", note)


def main():
    global ARGS
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--budget", type=float, default=200, help="seconds; parts that do not fit are left out")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--size", type=int, default=0)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--parts", nargs="+", default=[], help="names of the only parts to measure")
    parser.add_argument("--card", type=int, help="number of the only small card to measure")
    ARGS = parser.parse_args()
    ARGS.size = ARGS.size or (64 if ARGS.tiny else 512)
    if ARGS.tiny:
        ARGS.batch, ARGS.steps = 2, 2
    ARGS.out.mkdir(parents=True, exist_ok=True)
    parts = (ceilings, 5), (end_to_end, 40), (loops, 60), (small_cards, 40), (repeatable, 20)
    if ARGS.card is not None:
        parts = ((partial(small_card, *SMALL_CARDS[ARGS.card]), 0),)
    for part, seconds in parts:
        name = getattr(part, "__name__", "one card")
        if ARGS.parts and name not in ARGS.parts:
            continue
        if ARGS.budget - (time.perf_counter() - BEGAN) < seconds:
            print(f"left out: {name}", flush=True)
            continue
        with section(name):
            part()
        found = {"device": torch.cuda.get_device_name() if CUDA else "CPU", "rows": ROWS, **FOUND}
        (ARGS.out / "steps.json").write_text(json.dumps(found, indent=1, default=str))
    print("\n| what | value | |\n| --- | --- | --- |")
    for each in ROWS:
        print("| " + " | ".join(each) + " |")
    for name, error in FOUND.get("errors", {}).items():
        print(f"ERROR {name}: {error}")
    print("seconds:", FOUND.get("seconds", {}))


if __name__ == "__main__":
    main()
