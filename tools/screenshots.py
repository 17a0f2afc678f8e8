"""The README's screenshots of the editor: `python dev.py screenshots`, with a Chromium on the path.

The first template learns the demo's subject in a real ComfyUI, in a real browser of 1440 x 900 points. Writes
workflows/learn_one_picture.jpg, its card among the templates, and demo/live.webp, Train while it learns.
"""

import asyncio
import io
import json
import shutil
import sys
import tempfile
from pathlib import Path

from PIL import Image, ImageOps

from demo import client, show
from demo.workflow import override_workflow
from tests.support import browser

from .children import ROOT, STATE

SCREEN = 1440, 900
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


def first_graph(object_info):
    """The first template with the demo's subject and model."""
    changes = {**show.one_by_one(show.read_json(ROOT / "demo" / "overrides.json"))[0]}
    changes["EmptyLatentImage"] = {"width": 128, "height": 128, "batch_size": 4}
    known = ("CheckpointLoaderSimple", "LoadImage", "PersonalizeLoadReferences", "PersonalizeTextBoost")
    changes = {name: changes[name] for name in (*known, "PersonalizeTrain", "EmptyLatentImage", "KSampler")}
    workflow = show.read_json(ROOT / "workflows" / "learn_one_picture.json")
    return override_workflow(workflow, object_info, changes)


async def taken(url, workflow, profile):
    """Frames of Train while it learns, and the whole editor at the end; both PNG."""
    frames = []
    async with browser.open_editor(url, profile) as page:
        await page.resize(*SCREEN)
        await page.run(LOAD % json.dumps(workflow))
        await page.run("await app.queuePrompt(0, 1)")
        while not (ended := await page.run("return window.ended")):
            await asyncio.sleep(EVERY)
            frames.append(await page.captured(clip=await page.run(TRAIN)))
        if ended != "success":
            raise SystemExit(f"The training failed: {ended}")
        await asyncio.sleep(8)  # the message that a job is done goes away
        frames.append(await page.captured(clip=await page.run(TRAIN)))
        return [*map(opened, frames)], opened(await page.captured())


def opened(png):
    return Image.open(io.BytesIO(png)).convert("RGB")


def main():
    comfyui = Path(sys.argv[1])
    base = STATE / "screenshots"
    shutil.rmtree(base, ignore_errors=True)  # a training that is finished would be used again
    show.prepare(ROOT, base, sys.executable, "dog")
    server = client.Server(comfyui, sys.executable, base, cpu=not client.has_accelerator(sys.executable))
    with server as host, tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        frames, whole = asyncio.run(taken(server.url, first_graph(host.object_info()), Path(profile) / "profile"))
    whole.save(ROOT / "workflows" / "learn_one_picture.jpg", quality=85)
    size = tuple(map(max, zip(*(frame.size for frame in frames), strict=True)))  # the node grows while it learns
    first, *others = (ImageOps.pad(frame, size, color=frame.getpixel((0, 0)), centering=(0, 0)) for frame in frames)
    durations = [250] * len(others) + [LAST]
    first.save(ROOT / "demo" / "live.webp", save_all=True, append_images=others, duration=durations, loop=0, quality=80)
    print(f"{len(frames)} frames of {size[0]} x {size[1]}")


if __name__ == "__main__":
    main()
