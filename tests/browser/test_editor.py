"""The real editor in a real Chromium: does it open our workflows, and does our converter say what the editor says?"""

import asyncio
import json
from pathlib import Path

import pytest

from personalize.demo import show
from personalize.demo.workflow import override_workflow, to_api
from personalize.tests.support import browser, host

pytestmark = [pytest.mark.slow, pytest.mark.comfy, pytest.mark.browser]
ROOT = Path(__file__).resolve().parents[2]
WORKFLOWS = sorted((ROOT / "workflows").glob("*.json"))

LOAD = """
const workflow = %s;
await app.loadGraphData(workflow);
const missing = app.graph.nodes.filter(node => !(node.type in LiteGraph.registered_node_types));
return {prompt: (await app.graphToPrompt()).output, missing: missing.map(node => node.type)}
"""


@pytest.fixture(scope="module")
def in_editor(server, tmp_path_factory):
    """Runs the body of an async JavaScript function in one editor, which stays open, and returns its value."""
    loop = asyncio.new_event_loop()
    opened = browser.open_editor(server.url, tmp_path_factory.mktemp("browser") / "profile")
    page = loop.run_until_complete(opened.__aenter__())
    yield lambda body: loop.run_until_complete(page.run(body))
    loop.run_until_complete(opened.__aexit__(None, None, None))
    loop.close()


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_a_workflow_opens_and_converts_as_the_editor_does(in_editor, object_info, path):
    workflow = json.loads(path.read_text(encoding="utf-8"))
    seen = in_editor(LOAD % json.dumps(workflow))
    assert seen["missing"] == []
    assert to_api(workflow, object_info) == seen["prompt"]


QUEUE = """
await app.loadGraphData(%s);
const seen = {executed: {}, progress: 0}, api = window.comfyAPI.api.api;
api.addEventListener('progress_state', () => seen.progress++);
api.addEventListener('executed', e => { seen.executed[e.detail.node] = e.detail.output?.images?.length ?? 0 });
const end = new Promise(done => {
  api.addEventListener('execution_success', () => done('success'));
  api.addEventListener('execution_error', e => done(e.detail.exception_message));
});
await app.queuePrompt(0, 1);
seen.end = await end;
seen.said = document.body.innerText;
seen.titles = Object.fromEntries(app.graph.nodes.map(node => [node.id, node.title]));
return seen
"""


def test_the_editor_runs_the_workflow(in_editor, object_info):
    workflow = show.read_json(ROOT / "workflows" / "before_and_after.json")
    for changes in (host.demo_overrides(), host.QUICK, {"PersonalizeTrain": {"seed": 2, "preview_every": 2}}):
        workflow = override_workflow(workflow, object_info, changes)
    seen = in_editor(QUEUE % json.dumps(workflow))
    assert seen["end"] == "success"
    pictures = {seen["titles"][node]: number for node, number in seen["executed"].items()}
    assert pictures == {"Untrained": 1, "Trained": 1, "4  Learns while you watch": 0}
    assert seen["progress"] > 3
    assert "In prompts write <concept>" in seen["said"]  # as a text, not as an element of the page


def test_a_second_queue_asks_for_the_same(in_editor, object_info):
    """The editor draws a new number at each queue for what is called a seed, unless it is told not to: no value of our
    nodes may change by itself, or a training that is finished is another one.
    """
    ours = [name for name in object_info if name.startswith("Personalize")]
    seen = in_editor(
        f"""
        const changing = [];
        for (const type of {json.dumps(ours)}) {{
          const node = LiteGraph.createNode(type);
          app.graph.add(node);
          const preset = node.widgets?.find(widget => widget.name === 'preset');
          for (const value of preset?.options.values ?? ['']) {{
            if (preset) {{ preset.value = value; preset.callback?.(value); }}
            for (const widget of node.widgets ?? []) {{
              if (widget.name.includes('control') && widget.value !== 'fixed') changing.push(`${{type}} ${{value}}`);
            }}
          }}
        }}
        return changing
        """,
    )
    assert len(ours) > 20 and seen == []


def test_core_nodes_convert_as_the_editor_does(in_editor, object_info):
    """A workflow that the editor itself saves: a seed, a list of choices, dynamic inputs, a bypassed node, a note."""
    build = """
    const add = (type, values) => {
      const node = LiteGraph.createNode(type);
      app.graph.add(node);
      for (const [name, value] of Object.entries(values ?? {})) node.widgets.find(w => w.name === name).value = value;
      return node;
    };
    app.graph.clear();
    const load = add('CheckpointLoaderSimple', {ckpt_name: 'a.safetensors'}), save = add('SaveImage');
    add('Note');
    const text = add('CLIPTextEncode', {text: 'a, "b"'}), shift = add('CLIPSetLastLayer');
    const number = add('PrimitiveInt', {value: 64}), size = add('EmptyLatentImage', {height: 96});
    const sampler = add('KSampler', {seed: 5, steps: 7, cfg: 2.5, sampler_name: 'ddim'}), decode = add('VAEDecode');
    const join = add('BatchImagesNode'), match = add('ColorTransfer', {source_stats: 'target_frame'});
    load.connect(0, sampler, 0);
    load.connect(1, shift, 0);
    shift.connect(0, text, 0);
    shift.mode = 4;
    text.connect(0, sampler, 1);
    text.connect(0, sampler, 2);
    number.connect(0, size, size.inputs.findIndex(i => i.name === 'width'));
    size.connect(0, sampler, 3);
    sampler.connect(0, decode, 0);
    load.connect(2, decode, 1);
    decode.connect(0, join, 0);
    decode.connect(0, join, 1);
    join.connect(0, match, 0);
    decode.connect(0, match, 1);
    match.connect(0, save, 0);
    const saved = await app.graphToPrompt();
    return {workflow: saved.workflow, prompt: saved.output}
    """
    seen = in_editor(build)
    assert len(seen["prompt"]) == 9, "the graph was not built as meant"
    assert to_api(seen["workflow"], object_info) == seen["prompt"]
