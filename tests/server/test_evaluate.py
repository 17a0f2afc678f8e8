"""A whole evaluation on a real server: a training, the untrained and the trained model, one report, and its page in a
real browser.
"""

import asyncio

import pytest
from PIL import Image

from personalize.demo import show
from personalize.demo.client import HostError
from personalize.demo.workflow import override
from personalize.tests.support import browser, evaluating, host, prompts

pytestmark = [pytest.mark.slow, pytest.mark.comfy]
LINES = "a photo of a {} on the beach\na photo of a {} in the snow"


@pytest.fixture(scope="module")
def metric_models(server):
    """The inputs that name the world's metric models, whose files lie in the server's folder."""
    return evaluating.write_for_server(server.base / "models" / "clip_vision")


@pytest.fixture(scope="module")
def build(server, object_info, metric_models):
    """`build(recipe, **evaluate)`: an API prompt from one image to a report of base and trained."""

    def node(kind, **inputs):
        return {"class_type": kind, "inputs": prompts.defaults(object_info[kind]["input"]) | inputs}

    def go(recipe=None, **changes):
        small = {"preset.steps": 2, "preset.batch_size": 2, "preset.views": 4, **host.CAPTIONS}
        recipe = {"preset": "benchmark"} | small | (recipe or {})
        shared = {
            "metric_models": ["metric models", 0],
            "vae": ["checkpoint", 2],
            "concept": ["references", 0],
            "prompt_set": "own",
        }
        shared |= {"compare_with": "class word", "prompts": LINES, "seeds": 2, "steps": 4, "cfg": 4.0} | changes
        untrained = {"model": ["checkpoint", 0], "clip": ["checkpoint", 1], "token_format": "C", "label": "base"}
        trained = {"model": ["train", 0], "clip": ["train", 1], "label": "TextBoost"}
        return {
            "metric models": node("PersonalizeMetricModels", **metric_models),
            "checkpoint": node("CheckpointLoaderSimple", ckpt_name=server.checkpoint),
            "picture": node("LoadImage", image=show.REFERENCE),
            "references": node(
                "PersonalizeLoadReferences", **{"images.image0": ["picture", 0]}, resolution=128, crop="center",
                initializer_token="blue dog",
            ),
            "recipe": {"class_type": "PersonalizeTextBoost", "inputs": recipe},
            "train": node(
                "PersonalizeTrain", model=["checkpoint", 0], clip=["checkpoint", 1], vae=["checkpoint", 2],
                concept=["references", 0], recipe=["recipe", 0], preview_every=0,
                precision="auto",
            ),
            "base": node("PersonalizeEvaluate", **shared | untrained),
            "trained": node("PersonalizeEvaluate", **shared | trained),
            "report": node("PersonalizeReport", **{"reports.report0": ["base", 0], "reports.report1": ["trained", 0]}),
        }  # fmt: skip

    return go


async def photograph(page_file, profile, picture, size):
    """Opens the page; returns how many pictures it shows, what it asked the network for, and its errors."""
    async with browser.open_page(page_file.as_uri(), profile, size) as page:
        for _ in range(100):
            if await page.run("return document.readyState === 'complete' && Boolean(document.querySelector('main'))"):
                break
            await asyncio.sleep(0.1)
        shown = await page.run(
            "const all = [...document.images]; await Promise.all(all.map(i => i.decode()));"
            "return all.filter(i => i.naturalWidth > 0).length"
        )
        asked = await page.run(
            "return performance.getEntriesByType('resource').filter(e => !e.name.startsWith('data:')).length"
        )
        await page.screenshot(picture)
        return shown, asked, page.errors


@pytest.mark.browser
def test_base_and_trained_in_one_report(server, build, tmp_path):
    history = server.run(build())
    (folder,) = (server.base / "output" / "personalize" / "reports").glob("base_TextBoost_*")
    assert sorted(each.name for each in folder.iterdir())[-1] == "table.png"
    told = "\n".join(history["outputs"]["report"]["text"])
    assert f"personalize/reports/{folder.name}/report.html" in told and "s to score" in told
    shown, asked, errors = asyncio.run(
        photograph(folder / "report.html", tmp_path / "profile", tmp_path / "page.png", (1280, 1400))
    )
    assert (shown, asked, errors) == (2 * 2 * 2 + 2, 0, [])  # with the reference and the scatter
    with Image.open(tmp_path / "page.png") as picture:
        assert len(picture.convert("RGB").getcolors(2**24)) > 100


def test_a_word_that_was_not_learned_stops_before_anything_is_drawn(server, build):
    prompt = build()
    prompt["base"]["inputs"]["token_format"] = "V"
    prompt["report"]["inputs"].pop("reports.report1")
    with pytest.raises(HostError, match="This CLIP has not learned <concept>"):
        server.run(prompt)


def test_a_metric_model_that_is_missing_is_said_before_the_training(server, build):
    prompt = build()
    del prompt["base"], prompt["report"]["inputs"]["reports.report0"]
    prompt["metric models"]["inputs"]["dino_weights"] = "none.safetensors"
    before = {*(server.base / "output").glob("personalize/runs/*")}
    with pytest.raises(HostError, match="There are no DINO weights 'none.safetensors'"):
        server.run(override(prompt, {"PersonalizeTrain": {"seed": 18}}))
    assert {*(server.base / "output").glob("personalize/runs/*")} == before
