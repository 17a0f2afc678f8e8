"""The live view in a real Chromium: two Train nodes, a reload in mid-run, a run that is finished, another client."""

import asyncio
import contextlib
import json
import time
from pathlib import Path

import pytest

from personalize.demo import show
from personalize.demo.workflow import override_workflow
from personalize.tests.support import browser, host, waiting

pytestmark = [pytest.mark.slow, pytest.mark.comfy, pytest.mark.browser]
ROOT = Path(__file__).resolve().parents[2]
STEPS = 1000  # more than there is time for: it is finished by hand
SMALL = {
    "PersonalizeTextBoost": {"preset.steps": STEPS, "preset.views": 8, "preset.batch_size": 1},
    "PersonalizeLoadReferences": {"resolution": 64},
    "PersonalizeTrain": {"seed": 50, "preview_every": 5, "preview_steps": 1, "preview_prompts": "a {}"},
}

# In every page: what is drawn, read from the pixels; `live` holds one view per Train node, in the order of their ids.
TOOLS = """
window.rejected = [];
addEventListener('unhandledrejection', event => rejected.push(String(event.reason?.stack ?? event.reason)));
window.live = () => app.graph.nodes.filter(node => node.type === 'PersonalizeTrain').sort((a, b) => a.id - b.id)
  .map(node => node.widgets.find(widget => widget.name === 'live').element);
window.look = box => {
  const canvas = box.querySelector('canvas'), {width, height} = canvas, columns = [];
  const pixels = canvas.getContext('2d').getImageData(0, 0, width, height).data;
  for (let i = 0; i < pixels.length; i += 4)  // the mean's blue
    if (pixels[i + 3] > 200 && pixels[i] < 90 && pixels[i + 2] > 200) columns.push((i / 4) % width / width);
  const button = box.querySelector('button'), pictures = [...box.querySelectorAll('img')];
  return {title: box.querySelector('header span').textContent, end: box.querySelector('footer').textContent,
    warned: box.querySelector('.warnings').textContent,
    shown: box.getBoundingClientRect().height, button: button.textContent,
    enabled: !button.disabled && button.textContent === 'Finish now', blue: columns.length,
    from: Math.min(1, ...columns), to: Math.max(0, ...columns),
    pictures: pictures.filter(each => each.naturalWidth).map(each => each.parentNode.textContent)};
};
"""
# A second training beside the first, with another seed.
SECOND = """
const train = app.graph.nodes.find(node => node.type === 'PersonalizeTrain'), second = train.clone();
app.graph.add(second);
second.pos = [train.pos[0], train.pos[1] + 1200];
second.widgets.find(widget => widget.name === 'seed').value = 51;
train.inputs.forEach((input, slot) => {
  const link = app.graph.links[input.link];
  if (link) app.graph.getNodeById(link.origin_id).connect(link.origin_slot, second, slot);
});
const preview = LiteGraph.createNode('PreviewImage');
app.graph.add(preview);
second.connect(3, preview, 0);
"""


def workflow(object_info):
    made = show.read_json(ROOT / "workflows" / "before_and_after.json")
    for changes in (host.demo_overrides(), host.QUICK, SMALL):
        made = override_workflow(made, object_info, changes)
    return made


async def opened(page, made):
    """The workflow in the editor, with a bird's eye view of it."""
    await page.run(TOOLS)
    await page.run(f"await app.loadGraphData({json.dumps(made)}); app.canvas.ds.scale = 0.5;")


async def until(page, what, timeout=waiting.LIMIT):
    """The views of a page, as soon as `what` holds for them."""
    end = time.monotonic() + timeout
    while time.monotonic() < end:
        seen = await page.run("return live().map(look)")
        if what(seen):
            return seen
        await asyncio.sleep(0.2)
    raise AssertionError(f"it did not come to that: {seen}")


def step_of(view):
    return int(view["title"].split("step ")[1].split()[0]) if ": step " in view["title"] else 0


async def finish(page, number):
    await page.run(f"live()[{number}].querySelector('button').click()")


async def reload(page):
    await page.run("window.stale = true")
    await page.command("Page.reload")
    stale, end = True, time.monotonic() + waiting.LIMIT
    while stale:
        assert time.monotonic() < end, "the page was not loaded again"
        with contextlib.suppress(browser.PageError, asyncio.TimeoutError):  # in between there is no page to ask
            stale = await page.run("return Boolean(window.stale)", timeout=5)
    await browser.wait_for_editor(page)


async def story(server, object_info, folder, seen):
    """What two people see of two trainings of the first one; everything is put into `seen`."""
    made = workflow(object_info)
    async with contextlib.AsyncExitStack() as stack:
        editors = [browser.open_editor(server.url, folder / name) for name in ("one", "two")]
        one, two = [await stack.enter_async_context(editor) for editor in editors]
        await opened(one, made)
        await one.run(SECOND)
        made = await one.run("return app.graph.serialize()")
        await opened(two, made)
        seen["saved"], seen["again"] = made, await two.run("return app.graph.serialize()")
        seen["prompt"] = await one.run("return (await app.graphToPrompt()).output")
        seen["idle"] = await one.run("return live().map(look)")

        await one.run("await app.queuePrompt(0, 1)")
        seen["start"] = await until(one, lambda views: any(step_of(v) >= 5 and v["blue"] for v in views))
        first = seen["first"] = next(number for number, view in enumerate(seen["start"]) if view["enabled"])
        second, far = 1 - first, seen["start"][first]["to"]
        seen["later"] = await until(one, lambda views: views[first]["to"] > far and len(views[first]["pictures"]) > 2)
        await until(one, lambda views: step_of(views[first]) >= 12)
        seen["other"] = await two.run("return live().map(look)")
        await reload(one)
        await opened(one, made)
        seen["reloaded"] = await until(one, lambda views: step_of(views[first]) > 12 and views[first]["blue"])

        await finish(one, first)
        seen["ended"] = await until(one, lambda views: views[first]["end"])
        seen["both"] = await until(one, lambda views: step_of(views[second]) >= 5 and views[second]["blue"])
        await finish(one, second)
        seen["end"] = await until(one, lambda views: all(view["end"] for view in views))
        await nothing_queued(server)
        with vue_nodes(server):
            await reload(two)
            await opened(two, made)
            # The host forgets, so the nodes run again; both runs are there already.
            server.client.post("/free", {"free_memory": True, "unload_models": True})
            await two.run("await app.queuePrompt(0, 1)")
            seen["vue"] = await until(
                two, lambda views: all(v["end"] and v["blue"] and v["shown"] > 150 and v["pictures"] for v in views)
            )
        await nothing_queued(server)  # the views show an earlier run before the prompt has ended
        seen["errors"] = [
            *one.errors,
            *two.errors,
            *await one.run("return rejected"),
            *await two.run("return rejected"),
        ]


async def nothing_queued(server):
    """Once every prompt has ended: its history is complete only then."""
    await asyncio.to_thread(waiting.until, lambda: not any(server.client.get("/queue").values()), server.client.alive)


@contextlib.contextmanager
def vue_nodes(server):
    server.client.post("/settings/Comfy.VueNodes.Enabled", True)
    try:
        yield
    finally:
        server.client.post("/settings/Comfy.VueNodes.Enabled", False)


@pytest.fixture(scope="module")
def seen(server, object_info, tmp_path_factory):
    before = {path.name for path in (server.base / "output" / "personalize" / "runs").glob("*")}
    earlier = server.client.get("/history")  # other tests train on the same server
    found = {}
    asyncio.run(story(server, object_info, tmp_path_factory.mktemp("browsers"), found))
    runs = [path for path in (server.base / "output" / "personalize" / "runs").glob("*") if path.name not in before]
    found["runs"] = {json.loads((run / "run.json").read_text())["settings"]["seed"]: run for run in runs}
    found["histories"] = [
        h for key, h in server.client.get("/history").items() if key not in earlier and has_two_trainings(h)
    ]
    return found


def has_two_trainings(history):
    return sum(node["class_type"] == "PersonalizeTrain" for node in history["prompt"][2].values()) == 2


@pytest.mark.parametrize("when", ["idle", "other"])
def test_nothing_is_shown_before_a_training_nor_to_another_client(seen, when):
    assert [(view["shown"], view["blue"]) for view in seen[when]] == [(0, 0)] * 2


def test_the_view_is_no_part_of_prompts_and_saved_workflows(seen, object_info):
    known = {
        *object_info["PersonalizeTrain"]["input"]["required"],
        *object_info["PersonalizeTrain"]["input"]["optional"],
    }
    trains = [node for node in seen["prompt"].values() if node["class_type"] == "PersonalizeTrain"]
    assert len(trains) == 2 and all(set(node["inputs"]) <= known for node in trains)
    values = [
        [n["widgets_values"] for n in w["nodes"] if n["type"] == "PersonalizeTrain"]
        for w in (seen["saved"], seen["again"])
    ]
    assert values[0] == values[1] and len(values[0]) == 2
    for saved, seed in zip(values[0], (50, 51)):
        assert saved == [seed, "fixed", "a {}", 5, 1, 1, 4.0, "auto", 0, 50, False], (
            "one value per widget, in their order"
        )


def test_the_curve_grows_while_it_trains(seen):
    start, later = (seen[when][seen["first"]] for when in ("start", "later"))
    assert later["to"] > start["to"] > 0 and later["shown"] > 100
    assert f"of {STEPS}" in later["title"] and "left" in later["title"] and not later["end"]
    assert all(name.startswith("step ") and int(name[5:]) % 5 == 0 for name in later["pictures"])


def test_each_node_shows_its_own_run(seen):
    first, second = seen["first"], 1 - seen["first"]
    for when in ("later", "reloaded"):
        assert seen[when][second]["blue"] == 0 and not seen[when][second]["enabled"]
    assert seen["both"][first]["end"] and not seen["both"][first]["enabled"] and seen["both"][second]["enabled"]
    assert step_of(seen["both"][second]) > 0


def test_a_reloaded_editor_shows_the_whole_curve(seen):
    there, after = (seen[when][seen["first"]]["from"] for when in ("later", "reloaded"))
    assert after == pytest.approx(there, abs=0.01), "it does not begin at step 1"


def test_finish_now_ends_both_with_a_result_that_the_graph_goes_on_with(seen):
    assert set(seen["runs"]) == {50, 51}
    for run in seen["runs"].values():
        about = json.loads((run / "run.json").read_text())
        assert about["complete"] and 5 <= about["steps"] < STEPS and "finished by hand" in about["stop_reason"]
    first, again = seen["histories"]
    for history in (first, again):
        assert history["status"]["status_str"] == "success"
        saved = [
            o["images"] for o in history["outputs"].values() if any(i["type"] == "output" for i in o.get("images", []))
        ]
        assert len(saved) == 2, "the untrained and the trained picture"


def test_both_nodes_say_why_it_ended(seen):
    assert all("finished by hand" in view["end"] and not view["enabled"] for view in seen["end"])


def test_what_was_ended_by_hand_can_train_on(seen):
    assert [view["button"] for view in seen["vue"]] == ["Train on", "Train on"]


def test_a_run_that_is_there_already_is_drawn_on_nodes_of_the_new_kind(seen):
    for view in seen["vue"]:
        assert "TextBoost:" in view["title"] and "finished by hand" in view["end"] and view["pictures"]


def test_no_script_failed(seen):
    assert seen["errors"] == []


async def one_training(server, made, folder):
    """What the view shows of a training whose prompt misses the subject, after a reload, and in the template again."""
    seen = {}
    async with browser.open_editor(server.url, folder) as page:
        await opened(page, made)
        await page.run("await app.queuePrompt(0, 1)")
        seen["warned"] = (await until(page, lambda views: views[0]["warned"]))[0]
        seen["ended"] = (await until(page, lambda views: views[0]["end"]))[0]
        await nothing_queued(server)
        await reload(page)
        await page.run(TOOLS)
        seen["reloaded"] = (await until(page, lambda views: views and views[0]["blue"]))[0]
        await opened(page, made)
        seen["opened"] = (await page.run("return live().map(look)"))[0]
    return seen


def test_a_view_belongs_to_its_workflow_and_warns_before_the_training(server, object_info, tmp_path):
    made = workflow(object_info)
    for changes in ({"PersonalizeTextBoost": {"preset.steps": 3}}, {"Trained: prompt": {"text": "a photo of a dog"}}):
        made = override_workflow(made, object_info, changes)
    seen = asyncio.run(one_training(server, made, tmp_path / "profile"))
    assert "No prompt has the placeholder <concept>" in seen["warned"]["warned"] and not seen["warned"]["title"]
    assert seen["ended"]["warned"] == seen["warned"]["warned"]
    assert "3 steps" in seen["ended"]["title"] and seen["reloaded"]["blue"]
    assert seen["reloaded"]["title"] == seen["ended"]["title"] and seen["reloaded"]["end"] == seen["ended"]["end"]
    assert (seen["opened"]["shown"], seen["opened"]["title"]) == (0, ""), (
        "a template shows the curve of an earlier graph"
    )


@pytest.mark.parametrize("path", sorted((ROOT / "workflows").glob("*.json")), ids=lambda path: path.stem)
def test_a_template_gets_an_identity_when_it_is_opened(path):
    """With one of its own, two graphs that were made from it would be the same to the editor, and share their view."""
    assert "id" not in show.read_json(path)
