"""A real ComfyUI on this card with a checkpoint of SD 1.5's real shape: from Queue to the image, as a user waits.

python benchmarks/gpu/graph.py --comfyui DIR --out OUT --budget 150
"""

import argparse
import importlib.util
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from PIL import Image

ROOT, HERE = Path.cwd(), Path(__file__).resolve().parent
BEGAN = time.perf_counter()


def load_pack():
    spec = importlib.util.spec_from_file_location(
        "personalize", ROOT / "__init__.py", submodule_search_locations=[str(ROOT)]
    )
    sys.modules["personalize"] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)


def prompt(info, image, kind, recipe, train, args):
    """An API prompt: checkpoint, one reference, a recipe, Train, and an image generated with what it learned."""
    from personalize.tests.support.prompts import defaults

    def node(name, **inputs):
        return {"class_type": name, "inputs": {**defaults(info[name]["input"]), **inputs}}

    links = {"model": ["c", 0], "clip": ["c", 1], "vae": ["c", 2]}
    images = {"images.image0": ["i", 0], "resolution": args.size, "crop": "center", "class_word": "dog"}
    sampling = {"seed": 1, "steps": args.sampler_steps, "cfg": 7.0, "sampler_name": "dpmpp_2m", "scheduler": "karras"}
    ends = {"model": ["t", 0], "positive": ["p", 0], "negative": ["n", 0], "latent_image": ["e", 0], "denoise": 1.0}
    return {
        "c": {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": "real.safetensors"}},
        "i": {"class_type": "LoadImage", "inputs": {"image": image}},
        "r": node("PersonalizeLoadReferences", **images),
        "k": node(kind, **recipe),
        "t": node("PersonalizeTrain", concept=["r", 0], recipe=["k", 0], precision="auto", **links, **train),
        "p": {"class_type": "CLIPTextEncode", "inputs": {"clip": ["t", 1], "text": "a photo of <concept>"}},
        "n": {"class_type": "CLIPTextEncode", "inputs": {"clip": ["t", 1], "text": ""}},
        "e": {"class_type": "EmptyLatentImage", "inputs": {"width": args.size, "height": args.size, "batch_size": 1}},
        "s": {"class_type": "KSampler", "inputs": {**ends, **sampling}},
        "d": {"class_type": "VAEDecode", "inputs": {"samples": ["s", 0], "vae": ["c", 2]}},
        "o": {"class_type": "SaveImage", "inputs": {"images": ["d", 0], "filename_prefix": "check"}},
    }


def jobs(tiny):
    """Name, image, recipe node, its values, and Train's."""
    one = {"preset.steps": 1, "preset.views": 1, "preset.batch_size": 1} if tiny else {}
    stages = {"preset.steps_1": 10, "preset.steps_2": 10, "preset.steps_3": 60, "preset.views": 64}
    if tiny:
        stages = {"preset.run_stages": "1", "preset.steps_1": 1, "preset.views": 1, "preset.batch_size_1": 1}
    textboost, large = {"preset": "benchmark", **one}, {"preset": "benchmark", "preset.steps": 10, **one}
    return [
        ("TextBoost, 250 steps, 512 views, previews", "small.png", "PersonalizeTextBoost", textboost, 50),
        ("TextBoost, 10 steps, 512 views of a photo of 12 MP", "large.jpg", "PersonalizeTextBoost", large, 0),
        (
            "AttnDreamBooth, 10 + 10 + 60 steps, 64 views", "small.png", "PersonalizeAttnDreamBooth",
            {"preset": "paper", **stages}, 0,
        ),
    ]  # fmt: skip


def measured(client, base, request, left):
    """One prompt: seconds, those of the training, the card's memory in use, the median step, and what went wrong."""
    devices = client.get("/system_stats")["devices"][:1]
    free = [device["vram_free"] for device in devices]

    def poll():
        free.append(client.get("/system_stats")["devices"][0]["vram_free"])

    start, error = time.perf_counter(), ""
    try:
        client.run(request, timeout=max(30, left), on_poll=poll)
    except Exception as reason:  # whatever a host on a card nobody has seen says
        error = str(reason)[:400]
    seconds = time.perf_counter() - start
    runs = sorted((base / "output" / "personalize" / "runs").glob("*/run.json"), key=lambda f: f.stat().st_mtime)
    info = json.loads(runs[-1].read_text()) if runs else {}
    log = runs[-1].parent / "steps.jsonl" if runs else None
    entries = [json.loads(line) for line in log.read_text().splitlines()] if log and log.exists() else []
    pace = [b["seconds"] - a["seconds"] for a, b in zip(entries, entries[1:]) if b["stage"] == a["stage"]]
    used = devices[0]["vram_total"] - min(free) if devices else 0
    return dict(
        seconds=seconds, training=info.get("seconds", 0), steps=len(entries), used=used, error=error,
        pace=statistics.median(pace) if pace else 0.0,
    )  # fmt: skip


def start(api, comfyui, base, timeout):
    """A server as users start it; with the host's plainest memory management where that fails on a lent machine."""
    server = api.Server(comfyui, sys.executable, base)
    try:
        return server, server.start(timeout=timeout)
    except Exception as error:  # the message says what is different here
        print("the server did not start as users start it:", str(error)[-600:], flush=True)
    server = api.Server(comfyui, sys.executable, base, arguments=["--disable-cuda-malloc", "--disable-dynamic-vram"])
    return server, server.start(timeout=timeout)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--comfyui", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--budget", type=float, default=150)
    parser.add_argument("--tiny", action="store_true", help="one step at 64 px, to test this on a CPU")
    args = parser.parse_args()
    args.size, args.sampler_steps = (64, 1) if args.tiny else (512, 20)
    args.out.mkdir(parents=True, exist_ok=True)
    load_pack()
    from personalize.demo import client as api

    base = Path(tempfile.mkdtemp(prefix="graph"))
    api.make_base_directory(base, {"personalize": ROOT})
    (base / "input").mkdir(exist_ok=True)
    (base / "models" / "checkpoints").mkdir(parents=True, exist_ok=True)
    path = f"{args.comfyui}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    checkpoint = base / "models" / "checkpoints" / "real.safetensors"
    subprocess.run(
        [sys.executable, HERE / "make_checkpoint.py", checkpoint], check=True, env={**os.environ, "PYTHONPATH": path}
    )
    small = Image.frombytes("RGB", (64, 64), random.Random(0).randbytes(64 * 64 * 3))
    small.resize((1024, 1024)).save(base / "input" / "small.png")
    small.resize((4032, 3024)).save(base / "input" / "large.jpg")
    server, client = start(api, args.comfyui, base, 300 if args.tiny else 60)
    rows, found = [], {}
    try:
        print(f"server up after {time.perf_counter() - BEGAN:.0f} s", flush=True)
        info = client.object_info()
        for name, image, kind, recipe, preview_every in jobs(args.tiny):
            left = args.budget - (time.perf_counter() - BEGAN)
            if left < 25:
                print("left out:", name, flush=True)
                continue
            train = {"preview_every": 0 if args.tiny else preview_every}
            row = found[name] = measured(client, base, prompt(info, image, kind, recipe, train, args), left)
            note = (
                f"training {row['training']:.1f} s, {row['steps']} steps, median {1e3 * row['pace']:.0f} ms, at most "
            )
            note += (
                f"{row['used'] / 2**30:.2f} GiB of the card in use{'; ERROR ' + row['error'] if row['error'] else ''}"
            )
            rows.append((name, f"{row['seconds']:.1f} s", note))
            print(" ", *rows[-1], flush=True)
    finally:
        server.stop()
        text = (base / "server.log").read_text(errors="replace")
        (args.out / "server.log").write_text(text[-400_000:])
    (args.out / "graph.json").write_text(json.dumps(found, indent=1))
    words = ("Traceback", "DynamicVRAM", "aimdo", "VAE load", "out of memory", "Set vram state", "Device:")
    for line in [line for line in text.splitlines() if any(word in line for word in words)][:20]:
        print("   log:", line[:160])
    print("\n| in the graph | seconds | |\n| --- | --- | --- |")
    for each in rows:
        print("| " + " | ".join(each) + " |")
    shutil.rmtree(base, ignore_errors=True)


if __name__ == "__main__":
    main()
