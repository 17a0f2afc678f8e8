"""The README's screenshots of the editor: `python dev.py screenshots`, with a Chromium on the path.

Each template learns the demo's subject in a real ComfyUI, in a real browser of 1440 x 900 points; those for models that
the demo does not have are taken as they open. Writes its card, workflows/<name>.jpg, and demo/live.webp, Train of the
first template while it learns. `python -m tools.screenshots COMFYUI NAME ...` takes some of them.
"""

import asyncio
import io
import json
import shutil
import sys
import tempfile
from pathlib import Path

from PIL import Image, ImageOps

from demo import client, evaluators, show
from demo.workflow import override_workflow
from tests.support import browser

from .children import ROOT, STATE

SCREEN = 1440, 900
FIRST = "learn_one_picture"
NAMES = [FIRST, *sorted({path.stem for path in (ROOT / "workflows").glob("*.json")} - {FIRST})]
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
EVERY, LAST = 4.0, 4000  # seconds between two frames; milliseconds that the last one stays
LOAD = """
await app.extensionManager.setting.set('Comfy.VueNodes.Enabled', false);
await app.extensionManager.setting.set('Comfy.Minimap.Visible', false);
await app.loadGraphData(%s);
window.ended = '';
const api = window.comfyAPI.api.api;
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


async def take(url, workflows, still, profile):
    """Writes each template's card as soon as it has learned, of those in `still` as it opens, and the first's film."""
    async with browser.open_editor(url, profile) as page:
        await page.resize(*SCREEN)
        for name, workflow in workflows.items():
            await page.run(LOAD % json.dumps(workflow))
            if name in still:
                await asyncio.sleep(4)  # the pictures of its nodes are loaded
                frames, whole = [], opened(await page.captured())
            else:
                await page.run("await app.queuePrompt(0, 1)")
                *frames, whole = [frame async for frame in learning(page, name)]
            whole.save(ROOT / "workflows" / f"{name}.jpg", quality=85)
            if frames:
                film(frames)
            print(f"  {name}", flush=True)


async def learning(page, name):
    """Frames of a template from its queue to its end, the last one of the whole editor."""
    while not (ended := await page.run("return window.ended")):
        await asyncio.sleep(EVERY)
        if name == FIRST:
            yield opened(await page.captured(clip=await page.run(TRAIN)))
    if ended != "success":
        raise SystemExit(f"The template {name} failed: {ended}")
    await asyncio.sleep(8)  # the message that a job is done goes away
    if name == FIRST:
        yield opened(await page.captured(clip=await page.run(TRAIN)))
    yield opened(await page.captured())


def opened(png):
    return Image.open(io.BytesIO(png)).convert("RGB")


def film(frames):
    """Writes demo/live.webp."""
    size = tuple(map(max, zip(*(frame.size for frame in frames), strict=True)))  # the node grows while it learns
    first, *others = (ImageOps.pad(frame, size, color=frame.getpixel((0, 0)), centering=(0, 0)) for frame in frames)
    durations = [250] * len(others) + [LAST]
    first.save(ROOT / "demo" / "live.webp", save_all=True, append_images=others, duration=durations, loop=0, quality=80)


def main():
    comfyui, names = Path(sys.argv[1]), sys.argv[2:] or NAMES
    base = STATE / "screenshots"
    shutil.rmtree(base, ignore_errors=True)  # a training that is finished would be used again
    show.prepare(ROOT, base, sys.executable, "dog")
    write_metric_models(base / "models" / "clip_vision")
    templates = {name: show.read_json(ROOT / "workflows" / f"{name}.json") for name in names}
    still = {name for name, workflow in templates.items() if place_files(workflow, base / "models")}
    server = client.Server(comfyui, sys.executable, base, cpu=not client.has_accelerator(sys.executable))
    with server as host, tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        object_info = host.object_info()
        workflows = {name: with_demo(name, object_info) for name in names}
        asyncio.run(take(server.url, workflows, still, Path(profile) / "profile"))


if __name__ == "__main__":
    main()
