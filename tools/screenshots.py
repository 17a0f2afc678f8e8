"""The README's screenshots of the editor: `python dev.py screenshots`, with a Chromium on the path.

Each template learns the demo's subject in a real ComfyUI, in a real browser of 1440 x 900 points; those for models that
the demo does not have are taken as they open. Writes its card, workflows/<name>.jpg, and demo/live.webp, Train of the
first template while it learns. One that was interrupted goes on at the template it had not finished; `python -m
tools.screenshots COMFYUI NAME ...` takes some of them, from the beginning.
"""

import asyncio
import io
import json
import shutil
import sys
import tempfile
import time
from pathlib import Path

from PIL import Image, ImageOps

from demo import client, evaluators, show
from demo.workflow import override_workflow
from tests.support import browser, waiting

from .children import ROOT, STATE

SCREEN = 1440, 900
FIRST = "learn_one_picture"
NAMES = [FIRST, *sorted({path.stem for path in (ROOT / "workflows").glob("*.json")} - {FIRST})]
TAKEN = "taken.json"  # in the base directory: names of the templates whose cards an interrupted call wrote
CLIP, ENCODER = "demo_world", "instance.safetensors"  # below models/clip_vision
METRIC_MODELS = {
    "clip_model": evaluators.CLIP_NAME, "clip_weights": CLIP, "dino_model": evaluators.ENCODER_NAME,
    "dino_weights": ENCODER, "diversity": "DINO encoder",
}  # fmt: skip
# On top of the demo's overrides: trainings of minutes in the drawn world.
SHORT = {
    "EmptyLatentImage": {"width": 128, "height": 128, "batch_size": 4},
    "PersonalizeMetricModels": METRIC_MODELS,
    "PersonalizeAttnDreamBooth": {"preset.steps_1": 40, "preset.steps_2": 60, "preset.steps_3": 100},
    "PersonalizeTextualInversion": {"preset.steps": 150},
    "PersonalizeDreamBoothLoRA": {"preset.steps": 150},
    "PersonalizeCustomDiffusion": {"preset.steps": 100, "preset.class_images": 8},
    "PersonalizeDVAR": {"preset.window": 60},
    "PersonalizePickByScore": {"every": 30},
}
FRAMES, LAST = 30, 4000  # frames of a training; milliseconds that the last one stays
EVERY, LONGEST = 2.0, 30.0  # seconds between two looks; between two frames where no step ends
LOAD = """
await app.extensionManager.setting.set('Comfy.VueNodes.Enabled', false);
await app.extensionManager.setting.set('Comfy.Minimap.Visible', false);
await app.loadGraphData(%s);
window.ended = ''; window.progress = 0;
const api = window.comfyAPI.api.api;
api.addEventListener('personalize.step', ({detail}) => { window.progress = detail.step / detail.steps; });
api.addEventListener('execution_success', () => { window.ended = 'success'; });
api.addEventListener('execution_error', event => { window.ended = event.detail.exception_message; });
"""
TRAIN = """
const node = app.graph.nodes.find(each => each.type === 'PersonalizeTrain'), {scale, offset} = app.canvas.ds;
const [x, y, width, height] = node.boundingRect, view = app.canvas.canvas.getBoundingClientRect();
return {x: view.x + (x + offset[0]) * scale, y: view.y + (y + offset[1]) * scale, width: width * scale,
  height: height * scale, scale: 1}
"""


def with_demo(name, object_info):
    """A template with the demo's subject, model and metric models."""
    changes = show.one_by_one(show.read_json(ROOT / "demo" / "overrides.json"))[0] | SHORT
    return override_workflow(show.read_json(ROOT / "workflows" / f"{name}.json"), object_info, changes)


def write_metric_models(folder):
    """The demo's CLIP, in a folder that names its architecture, and its instance encoder."""
    evaluators.register()
    (folder / CLIP).mkdir(parents=True)
    weights = folder / CLIP / "open_clip_model.safetensors"
    evaluators.expand_clip(evaluators.WEIGHTS / "evaluator_clip.safetensors", weights)
    config = {"model_cfg": show.read_json(evaluators.CLIP_CONFIG), "preprocess_cfg": {}}
    (folder / CLIP / "open_clip_config.json").write_text(json.dumps(config), encoding="utf-8")
    shutil.copy(evaluators.WEIGHTS / "evaluator_instance.safetensors", folder / ENCODER)


def place_files(workflow, models):
    """Put empty files where a template's loaders look for theirs, which are opened by nobody; return whether any."""
    files = [file for node in workflow["nodes"] for file in node["properties"].get("models", [])]
    missing = [file for file in files if file["directory"] != "checkpoints"]
    for file in missing:
        (models / file["directory"]).mkdir(parents=True, exist_ok=True)
        (models / file["directory"] / file["name"]).touch()
    return bool(missing)


async def take(host, workflows, still, profile):
    """Writes each template's card as soon as it has learned, of those in `still` as it opens, and the first's film.

    Yields the name of each once it is written.
    """
    async with browser.open_editor(host.url, profile) as page:
        await page.resize(*SCREEN)
        for name, workflow in workflows.items():
            await page.run(LOAD % json.dumps(workflow))
            if name in still:
                await asyncio.sleep(4)  # the pictures of its nodes are loaded
            else:
                await page.run("await app.queuePrompt(0, 1)")
                frames = [frame async for frame in learning(page, host, name)]
                if name == FIRST:
                    film(frames)
            opened(await page.captured()).save(ROOT / "workflows" / f"{name}.jpg", quality=85)
            print(f"  {name}", flush=True)
            yield name


async def learning(page, host, name):
    """Frames of the first template's Train while it learns; ends with the template."""
    drawn, at = -1.0, 0.0
    while not (seen := await page.run("return {ended: window.ended, progress: window.progress}"))["ended"]:
        host.alive()
        # By steps: a busy machine makes the film no longer, and taking it makes the training little slower.
        late = time.monotonic() - at > LONGEST
        if name == FIRST and (seen["progress"] >= drawn + 1 / FRAMES or late):
            drawn, at = seen["progress"], time.monotonic()
            yield opened(await page.captured(clip=await page.run(TRAIN)))
        await asyncio.sleep(EVERY)
    if seen["ended"] != "success":
        raise SystemExit(f"The template {name} failed: {seen['ended']}")
    await asyncio.sleep(8)  # the message that a job is done goes away
    if name == FIRST:
        yield opened(await page.captured(clip=await page.run(TRAIN)))


def opened(png):
    return Image.open(io.BytesIO(png)).convert("RGB")


def film(frames):
    """Writes demo/live.webp."""
    size = tuple(map(max, zip(*(frame.size for frame in frames), strict=True)))  # the node grows while it learns
    first, *others = (ImageOps.pad(frame, size, color=frame.getpixel((0, 0)), centering=(0, 0)) for frame in frames)
    durations = [250] * len(others) + [LAST]
    first.save(ROOT / "demo" / "live.webp", save_all=True, append_images=others, duration=durations, loop=0, quality=80)


def prepare(base, taken):
    """The base directory with everything that the templates need; after an interruption it is there already."""
    if not taken:
        shutil.rmtree(base, ignore_errors=True)  # a training that is finished would be used again
    for run in (base / "output" / "personalize" / "runs").glob("*"):
        if not (run / "run.json").exists() or not show.read_json(run / "run.json")["complete"]:
            shutil.rmtree(run)  # its beginning would not be in the film
    show.prepare(ROOT, base, sys.executable, "dog")
    if not taken:
        write_metric_models(base / "models" / "clip_vision")


async def take_all(host, names, still, on_taken):
    object_info = host.object_info()
    workflows = {name: with_demo(name, object_info) for name in names}
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        async for name in take(host, workflows, still, Path(profile) / "profile"):
            on_taken(name)


def main():
    comfyui, chosen = Path(sys.argv[1]), sys.argv[2:]
    base = STATE / "screenshots"
    taken = show.read_json(base / TAKEN) if (base / TAKEN).exists() and not chosen else []
    prepare(base, taken)
    names = chosen or [name for name in NAMES if name not in taken]

    def on_taken(name):
        taken.append(name)
        if not chosen:
            (base / TAKEN).write_text(json.dumps(taken), encoding="utf-8")

    templates = {name: show.read_json(ROOT / "workflows" / f"{name}.json") for name in names}
    still = {name for name, workflow in templates.items() if place_files(workflow, base / "models")}
    server = client.Server(comfyui, sys.executable, base, cpu=not client.has_accelerator(sys.executable))
    try:
        asyncio.run(take_all(server.start(waiting.LIMIT), names, still, on_taken))
    finally:
        server.stop()
    (base / TAKEN).unlink(missing_ok=True)  # the next call takes all of them again


if __name__ == "__main__":
    main()
