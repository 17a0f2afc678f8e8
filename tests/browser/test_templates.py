"""The templates as a newcomer sees them: small, readable, nothing on top of anything; the first one as an app, too."""

import asyncio
import json

import pytest

from personalize.demo import show
from personalize.demo.workflow import override_workflow
from personalize.tests.support import browser, host
from personalize.tests.support.host import ROOT

pytestmark = [pytest.mark.slow, pytest.mark.comfy, pytest.mark.browser]
SCREEN = 1440, 900
FIRST = "learn_one_picture"
OPEN = """
await app.extensionManager.setting.set('Comfy.VueNodes.Enabled', %s);
await app.loadGraphData(%s);
"""
# What `seen()` returns as soon as it has been the same for half a second.
STILL = """
let before, still = 0;
while (still < 5) {
  const now = JSON.stringify(seen());
  still = now === before ? still + 1 : 0;
  before = now;
  await new Promise(done => setTimeout(done, 100));
}
return JSON.parse(before);
"""
LOOK = (
    """
const view = app.canvas.canvas.getBoundingClientRect(), vue = window.LiteGraph.vueNodesMode;
const ds = app.canvas.ds;
const drawn = node => {
  if (vue) return document.querySelector(`[data-node-id="${node.id}"]`).getBoundingClientRect();
  const [x, y, width, height] = node.boundingRect, {scale, offset} = ds;
  return new DOMRect(view.x + (x + offset[0]) * scale, view.y + (y + offset[1]) * scale, width * scale, height * scale);
};
const errors = () => document.body.innerText.match(/.*errors? found/gi) ?? [];
while (%s && !errors().length) await new Promise(done => setTimeout(done, 100));
const look = node => {
  const {left, right, top, bottom} = drawn(node), folded = node.flags.collapsed;
  const shown = (node.widgets ?? []).filter(w => !w.hidden && !(vue && w.options?.advanced && !node.showAdvanced));
  const values = folded ? [] : shown.filter(w => w.type !== 'button' && w.options?.serialize !== false);
  return {title: node.title, left, right, top, bottom, values: values.map(w => w.name)};
};
const seen = () => (
  {vue, scale: ds.scale, errors: errors(), links: app.graph.links.size, nodes: app.graph.nodes.map(look)});
"""
    + STILL
)
# What is filled in, and what may be: names of the widgets that are seen without opening anything.
SEEN = {
    "1  Model": ["ckpt_name"],
    "2  One clear picture": ["image"],
    "3  What is it?": ["class_word", "placeholder_token"],
    "How it learns": ["preset", "preset.steps"],
    "4  Learns while you watch": [],
    "Keeps what it learned": ["name"],
    "5  What to generate": ["text"],
    "New images": ["filename_prefix"],
}


def opened(server, folder, *steps):
    """What functions return one after the other in one editor; each step is the screen's size and a body."""

    async def go():
        async with browser.open_editor(server.url, folder / "profile") as page:
            found = []
            for size, body in steps:
                await page.resize(*size)
                found.append(await page.run(body))
            return found

    return asyncio.run(go())


def template(name):
    return show.read_json(ROOT / "workflows" / f"{name}.json")


def opening(vue, workflow, complains=False):
    return OPEN % (json.dumps(vue), json.dumps(workflow)) + LOOK % json.dumps(complains)


def overlaps(nodes):
    """Pairs of titles of nodes that lie on top of each other."""

    def apart(one, other):
        beside = min(one["right"], other["right"]) <= max(one["left"], other["left"])
        return beside or min(one["bottom"], other["bottom"]) <= max(one["top"], other["top"])

    return [(a["title"], b["title"]) for i, a in enumerate(nodes) for b in nodes[:i] if not apart(a, b)]


# Template -> most nodes, wires and settings that are seen, and least zoom.
LIMITS = {
    "attndreambooth": (12, 16, 11, 0.8),
    "before_and_after": (15, 23, 10, 0.8),
    "compare_methods": (10, 11, 23, 0.75),
    "dvar": (13, 17, 13, 0.65),
    FIRST: (12, 18, 9, 0.8),
    "one_picture_qwen_image": (14, 18, 14, 0.8),
    "one_picture_z_image": (14, 18, 14, 0.8),
    "pick_by_score": (14, 18, 17, 0.65),
}


def parts(server):
    """Files in the server's folders for the loaders of a transformer, its text encoder and its autoencoder."""
    folders = {"UNETLoader": "diffusion_models", "CLIPLoader": "text_encoders", "VAELoader": "vae"}
    widgets = {"UNETLoader": "unet_name", "CLIPLoader": "clip_name", "VAELoader": "vae_name"}
    for folder in folders.values():
        (server.base / "models" / folder).mkdir(parents=True, exist_ok=True)
        (server.base / "models" / folder / "any.safetensors").touch()  # opened by nobody
    return {kind: {widget: "any.safetensors"} for kind, widget in widgets.items()}


@pytest.fixture(scope="module", params=[False, True], ids=["classic", "nodes 2.0"])
def looks(server, object_info, tmp_path_factory, request):
    """The first graph on a server that lacks its files (None), and each template, as it opens and enlarged."""
    vue, enlarged = request.param, (*SCREEN, 1.25)
    files = {kind: host.demo_overrides()[kind] for kind in ("CheckpointLoaderSimple", "LoadImage")} | parts(server)
    steps = [(SCREEN, opening(vue, template(FIRST), complains=True))]
    for name in LIMITS:
        workflow = override_workflow(template(name), object_info, files)
        steps += [(SCREEN, opening(vue, workflow)), (enlarged, LOOK % "false")]
    first, *others = opened(server, tmp_path_factory.mktemp("looks"), *steps)
    assert {each["vue"] for each in (first, *others)} == {vue}
    return {None: first} | dict(zip(LIMITS, zip(others[::2], others[1::2], strict=True), strict=True))


def test_the_first_graph_is_small_and_readable(looks):
    """Opened where its checkpoint is missing, of which the editor complains."""
    seen = looks[None]
    for node in seen["nodes"]:
        assert node["left"] >= 0 and node["right"] <= SCREEN[0], node["title"]
        assert node["top"] >= 0 and node["bottom"] <= SCREEN[1], node["title"]
    assert {node["title"]: node["values"] for node in seen["nodes"] if node["values"] or node["title"] in SEEN} == SEEN
    assert seen["errors"]


@pytest.mark.parametrize("name", LIMITS)
def test_a_template_opens_small_without_overlaps_and_errors(looks, name):
    nodes, wires, settings, zoom = LIMITS[name]
    plain = looks[name][0]
    assert plain["scale"] >= zoom and len(plain["nodes"]) <= nodes and plain["links"] <= wires
    assert sum(len(node["values"]) for node in plain["nodes"]) <= settings
    for each in looks[name]:
        assert (overlaps(each["nodes"]), each["errors"]) == ([], [])


def test_every_template_is_looked_at():
    assert sorted(path.stem for path in (ROOT / "workflows").glob("*.json")) == sorted(LIMITS)


APP = (
    """
const workflow = %s;
workflow.extra.linearMode = true;
await app.loadGraphData(workflow);
const seen = () => document.body.innerText;
while (!seen().includes('Run')) await new Promise(done => setTimeout(done, 100));
"""
    + STILL
)


def test_the_first_graph_is_an_app(server, tmp_path):
    """On a screen with its fields, on a phone at least without the nodes' names for them."""
    workflow = template(FIRST)
    fields = workflow["extra"]["linearData"]["inputs"]
    titles = {str(node["id"]): node.get("title") for node in workflow["nodes"]}
    assert [(titles[node], name) for node, name in fields] == [
        ("1  Model", "ckpt_name"), ("2  One clear picture", "image"), ("3  What is it?", "class_word"),
        ("5  What to generate", "text"),
    ]  # fmt: skip
    assert [titles[node] for node in workflow["extra"]["linearData"]["outputs"]] == ["New images"]
    body = APP % json.dumps(workflow)
    screen, phone = opened(server, tmp_path, (SCREEN, body), ((390, 844), body))
    for text in (screen, phone):
        assert "Run" in text and "ckpt_name" not in text and "class_word" not in text
    for label in ("Model", "One clear picture", "What is it?", "What to generate"):
        assert label in screen


BLUEPRINT = """
await app.loadGraphData(%s);
const [node] = app.graph.nodes, widgets = node.widgets.map(widget => [widget.name, widget.value]);
node.widgets[0].value = 'mug';
const add = type => { const made = LiteGraph.createNode(type); app.graph.add(made); return made; };
const image = add('LoadImage'), load = add('CheckpointLoaderSimple'), save = add('PersonalizeSave');
image.connect(0, node, 0);
for (const slot of [0, 1, 2]) load.connect(slot, node, slot + 1);
node.connect(2, save, 0);
return {widgets, prompt: (await app.graphToPrompt()).output}
"""


def test_one_node_that_learns_a_picture_is_offered(server, object_info, tmp_path):
    """Three nodes as one, in the editor's list of blueprints; its widgets are theirs."""
    name = "Personalize from one picture"
    offered = server.client.get("/global_subgraphs")
    assert [each["source"] for each in offered.values() if each["name"] == name] == ["custom_node"]
    blueprint = show.read_json(ROOT / "subgraphs" / f"{name}.json")
    (seen,) = opened(server, tmp_path, (SCREEN, BLUEPRINT % json.dumps(blueprint)))
    assert seen["widgets"] == [["class_word", "dog"], ["placeholder_token", "<concept>"], ["preset.steps", 250]]
    inputs = {node["class_type"]: node["inputs"] for node in seen["prompt"].values()}
    assert inputs["PersonalizeLoadReferences"]["class_word"] == "mug"
    assert inputs.keys() == {
        "LoadImage", "CheckpointLoaderSimple", "PersonalizeLoadReferences", "PersonalizeTextBoost", "PersonalizeTrain",
        "PersonalizeSave",
    }  # fmt: skip
    required = {kind: object_info[kind]["input"]["required"].keys() for kind in inputs}
    assert {kind: required[kind] - inputs[kind].keys() for kind in inputs} == dict.fromkeys(inputs, set())


def test_the_checkpoint_that_is_missing_can_be_downloaded():
    """The file of ComfyUI's own first graph, with what the editor's download asks for."""
    (loader,) = [node for node in template(FIRST)["nodes"] if node["type"] == "CheckpointLoaderSimple"]
    (model,) = loader["properties"]["models"]
    assert loader["widgets_values"] == [model["name"]] and model["directory"] == "checkpoints"
    assert model["url"].startswith("https://huggingface.co/Comfy-Org/") and model["name"] in model["url"]
