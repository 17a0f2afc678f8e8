"""The drawn world as a small data set in DreamBooth's form, and a command line for it. No test in here."""

import json
import os
import random
from pathlib import Path

import torch

from personalize.demo import build, world
from personalize.tests.support import evaluating

KINDS = {"dog": "live", "cat": "live"}
SCENES = (
    world.reference_scene(),
    world.Scene("on grass"),
    world.Scene("in the snow"),
    world.Scene("on the beach", side="on the left"),
    world.Scene("at night"),
)
# Prompts in the world's words: what its tiny model and its metric models know.
PROMPTS = "a photo of a {} in the snow\na photo of a {} on the beach\n"


def write(folder, subjects, pictures=3, first=0):
    """`images` of each of the world's classes `subjects`, of individuals that no training saw."""
    lines = ["Classes", "", "subject_name,class,kind,initializer"]
    for number, kind in enumerate(subjects):
        thing, name = world.instance(world.TEST_SEEDS[first + number], kind), f"{kind}_{number}"
        (folder / name).mkdir(parents=True)
        for i, scene in enumerate(SCENES[:pictures]):
            drawn = world.picture(world.draw(thing, scene, random.Random(f"{name} {i}")))
            drawn.convert("RGB").save(folder / name / f"{i:02d}.jpg", quality=95)
        lines.append(f"{name},{kind},{KINDS.get(kind, 'object')},{thing.colour} {kind}")
    (folder / "prompts_and_classes.txt").write_text("\n".join([*lines, "", "Prompts", ""]))
    return folder


def models(folder):
    """The flags that name the tiny checkpoint and the world's metric models, which are written into `folder`."""
    layout = {"unet": build.UNET, "heads": build.HEADS}
    (folder / "layout.json").write_text(json.dumps(layout))
    metric_models = evaluating.write_for_server(folder / "metric_models")
    named = [text for name, value in metric_models.items() for text in (f"--{name.replace('_', '-')}", value)]
    checkpoint = build.build_checkpoint(folder / "tiny.safetensors")
    files = ["--checkpoint", checkpoint, "--layout", folder / "layout.json", "--clip-folder", folder / "metric_models"]
    return [*map(str, files), "--device", "cpu", *named]


def environment(folder):
    """Of a process of `python -m trainers`, and of Ray's, that know the world's metric models by their names."""
    root = Path(build.__file__).parents[1]
    lines = [
        "import sys",
        "if any(word == 'trainers' or 'default_worker' in word for word in sys.orig_argv):",
        f"    sys.path.insert(0, {str(root)!r})",
        "    from demo import evaluators",
        "    evaluators.register()",
    ]
    (folder / "python").mkdir(exist_ok=True)
    (folder / "python" / "sitecustomize.py").write_text("\n".join(lines))
    threads = str(torch.get_num_threads())  # rounding depends on it
    # None that is not used: each imports all that for itself. And none that gives way to all other tests.
    ray = {"RAY_prestart_worker_first_driver": "0", "RAY_worker_niceness": "0"}
    return {**os.environ, **ray, "PYTHONPATH": str(folder / "python"), "OMP_NUM_THREADS": threads}
