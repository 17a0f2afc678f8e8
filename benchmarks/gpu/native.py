"""LoRA on Z-Image and Qwen-Image at their real shapes, with random weights, on this card: pace and peak memory.

    python benchmarks/gpu/native.py --comfyui DIR --out OUT --budget 150           on a GPU, from the repository's root
    python benchmarks/gpu/native.py --comfyui DIR --out OUT --budget 150 --tiny    the same code on a CPU, to test it

Each training may take no more of the card than one of the named size has; its plan is chosen as Train chooses it.
`python -m benchmarks.with_host COMFYUI counted_native` counts what is measured here.
"""

import argparse
import gc
import importlib
import json
import os
import statistics
import sys
import tempfile
import time
import traceback
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, os.getcwd())

import torch

from benchmarks import with_host

BEGAN = time.perf_counter()
CUDA = torch.cuda.is_available()
FLOAT8, TOKENS = torch.float8_e4m3fn, 128
# Family, precision of the base, pixels on a side, GB of the card; 0 for the whole one.
TRAININGS = (
    ("Z-Image", torch.bfloat16, 512, 16),
    ("Z-Image", torch.bfloat16, 1024, 24),
    ("Qwen-Image", FLOAT8, 512, 24),
    ("Z-Image", FLOAT8, 512, 12),
    ("Z-Image", torch.bfloat16, 512, 0),
)


class Text:
    """A CLIP whose conditioning is random numbers."""

    def __init__(self, width):
        self.width = width

    def tokenize(self, prompt):
        return prompt

    def encode_from_tokens_scheduled(self, prompt):
        generator = torch.Generator().manual_seed(len(prompt))
        hidden = torch.randn(1, TOKENS, self.width, generator=generator)
        return [[hidden, {"attention_mask": torch.ones(1, TOKENS, dtype=torch.long)}]]


def layout(family, tiny):
    """The host's class, its transformer's arguments and the width of its text."""
    if tiny:
        random_native = with_host.of_pack("tests.support.random_native")
        random_native.register()
        return *random_native.LAYOUTS[family], random_native.WIDTH
    kind, arguments, width, _ = importlib.import_module("benchmarks.counted_native").LAYOUTS[family]
    return getattr(importlib.import_module("comfy.supported_models"), kind), arguments, width


def model(kind, arguments, base):
    """A MODEL with random weights of one precision, that the host can make once more."""
    import comfy.sd

    device = "cuda" if CUDA else "cpu"
    config = kind(dict(arguments))
    config.set_inference_dtype(torch.bfloat16, None)
    state = {}
    for name, parameter in config.get_model({}, device="meta").diffusion_model.named_parameters():
        if parameter.ndim < 2:  # of a norm, or a bias
            values = torch.full(parameter.shape, float(name.endswith("weight")))
        else:
            values = torch.randn(parameter.shape, device=device, dtype=torch.bfloat16) / parameter[0].numel() ** 0.5
        state[name] = values.to(base if parameter.ndim == 2 else torch.bfloat16).cpu()

    def load(disable_dynamic=False):
        return comfy.sd.load_diffusion_model_state_dict(dict(state), {"dtype": base}, disable_dynamic=disable_dynamic)

    with torch.inference_mode():  # as the loaders do
        made = load()
    made.cached_patcher_init = (load, ())
    return made


def flow_models(made, family, width):
    """What Train makes of a MODEL; latents are random."""
    models = with_host.of_pack("tests.support.random_native").models_of(made, family, Text(width))
    models.encode_images = lambda pixels: (torch.randn(len(pixels), 16, *(n // 8 for n in pixels.shape[2:])), None)
    return models


def trained(models, size, limit):
    """Milliseconds per step, seconds before the first, the peak in GiB and the plan of a short training."""
    from trainers.data.concept import Concept
    from trainers.recipes.lora import LoRA
    from trainers.runs.callbacks import Callbacks
    from trainers.runs.run import Run
    from trainers.runs.train import train

    recipe = replace(LoRA(), steps=6, views=2, batch_size=1)
    concept = Concept(images=(torch.rand(3, size, size),), resolution=size)
    run = Run(concept=concept, recipe=recipe, dtype=torch.bfloat16)
    ends, said = [], []
    callbacks = Callbacks(on_step=lambda report: ends.append(time.perf_counter()), on_notice=said.append)
    options = {"device": "cuda" if CUDA else "cpu", "model": "random", "callbacks": callbacks}
    if CUDA:
        torch.cuda.empty_cache()
        total = torch.cuda.mem_get_info()[1]
        room = min(int(limit * 1e9) or total, total)
        torch.cuda.set_per_process_memory_fraction(room / total)
        torch.cuda.reset_peak_memory_stats()
        options["free_memory"] = lambda: room - torch.cuda.memory_allocated()
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        train(run, models, Path(folder) / "run", **options)
    pace = statistics.median(1e3 * (b - a) for a, b in zip(ends[1:], ends[2:], strict=False))
    plan = next((sentence for sentence in said if "memory besides" in sentence), "")
    peak = torch.cuda.max_memory_allocated() / 2**30 if CUDA else 0.0
    return {"ms": pace, "before": ends[0] - start, "peak": peak, "said": [plan, *said]}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--comfyui", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--budget", type=float, default=150, help="seconds; what does not fit is left out")
    parser.add_argument("--tiny", action="store_true")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    with_host.load_host(options.comfyui.resolve(), cpu=not CUDA)
    with_host.load_pack()
    rows, found, made, key = [], {}, None, None
    for family, base, size, limit in TRAININGS:
        name = f"{family}, {str(base).removeprefix('torch.')}, {size} px, {f'{limit} GB' if limit else 'whole card'}"
        if options.budget - (time.perf_counter() - BEGAN) < 25:
            print("left out:", name, flush=True)
            continue
        kind, arguments, width = layout(family, options.tiny)
        try:
            began = time.perf_counter()
            if key != (family, base):
                made, key = None, (family, base)
                gc.collect()
                made = model(kind, arguments, base)
            print(f"## {name}: weights made in {time.perf_counter() - began:.1f} s", flush=True)
            models = flow_models(made, family, width)
            result = trained(models, 64 if options.tiny else size, limit)
            note = f"{result['before']:.1f} s before the first; peak {result['peak']:.2f} GiB; {result['said'][0]}"
            rows.append((name, f"{result['ms']:.0f}", note))
            print("  ", *rows[-1], flush=True)
        except Exception as error:  # whatever breaks on a card nobody has seen
            result = {"error": f"{type(error).__name__}: {error}"[:500]}
            rows.append((name, "-", result["error"][:200]))
            traceback.print_exc(limit=12)
            if error.__context__ is not None:
                traceback.print_exception(error.__context__, limit=12)
        found[name] = result
        models = None
        gc.collect()
        if CUDA:
            torch.cuda.set_per_process_memory_fraction(1.0)
            torch.cuda.empty_cache()
        (options.out / "native.json").write_text(json.dumps(found, indent=1))
    print("\n| LoRA on a transformer | ms per step | |\n| --- | --- | --- |")
    for each in rows:
        print("| " + " | ".join(each) + " |")


if __name__ == "__main__":
    main()
