"""The gallery of runs in a real Chromium: chosen with a click, renamed and deleted in the editor's own dialogs."""

import asyncio
import json

import pytest
from PIL import Image

from personalize.tests.support import browser
from personalize.trainers.runs.info import RunInfo

pytestmark = [pytest.mark.slow, pytest.mark.comfy, pytest.mark.browser]
RUNS = {False: ("0" * 15 + "a", "0" * 15 + "b"), True: ("0" * 15 + "c", "0" * 15 + "d")}  # of each test its own
START = """
await app.extensionManager.setting.set('Comfy.VueNodes.Enabled', %(vue)s);
app.graph.clear();
for (const type of ['PersonalizeLoad', 'PersonalizeRuns', 'PersonalizePlotHistory', 'PersonalizeTrain'])
  app.graph.add(LiteGraph.createNode(type));
const [load, runs, plot, train] = app.graph.nodes;
window.card = (node, run) =>
  widget(node, 'gallery').element.querySelector(`[data-run="${run}"]`);
window.widget = (node, wanted) => // a node that is clicked comes to the front, which is the end of their list
  app.graph.nodes.find(({type}) => type === `Personalize${node}`).widgets.find(({name}) => name === wanted);
window.until = async what => { while (!what()) await new Promise(done => setTimeout(done, 100)); return what(); };
window.press = (place, words) =>
  [...place.querySelectorAll('button')].find(button => button.textContent.trim() === words).click();
window.chosen = node => card(node, '%(old)s').classList.contains('chosen');
window.dialog = () => document.querySelector('[role=dialog]');
const draw = CanvasRenderingContext2D.prototype.fillText, drawn = [];
CanvasRenderingContext2D.prototype.fillText = function (text, ...place) {
  drawn.push(text);
  return draw.call(this, text, ...place);
};
window.forget = () => drawn.splice(0);
window.seen = words => drawn.some(text => text.startsWith(words)) ||
  [...document.querySelectorAll('[data-node-id]')].some(node => node.innerText.includes(words));
await until(() => card('Load', '%(old)s')?.querySelector('img').naturalWidth);
const height = plot.size[1];
train.connect(2, plot, 0);
const folded = plot.size[1];
train.disconnectOutput(2);
return {heights: [height, folded, plot.size[1]], text: card('Load', '%(old)s').innerText}
"""
CHOOSE = """
for (const node of ['Load', 'PlotHistory']) card(node, '%(old)s').click();
await until(() => seen('<dog> TextBoost'));
return [widget('Load', 'run').value, chosen('Load'), chosen('Runs')]
"""
RENAME = """
press(card('Runs', '%(old)s'), 'Rename');
const input = await until(() => dialog()?.querySelector('input'));
input.value = 'Rex';
input.dispatchEvent(new Event('input', {bubbles: true}));
await new Promise(done => setTimeout(done, 200));
forget();
press(dialog(), 'Confirm');
await until(() => card('Runs', '%(old)s').innerText.includes('Rex'));
await until(() => seen('Rex: <dog>'));
return [widget('Load', 'run').value, card('Load', '%(old)s').querySelector('b').textContent]
"""
DELETE = """
await until(() => !dialog());
press(card('Runs', '%(old)s'), 'Delete');
await until(() => dialog());
const said = dialog().innerText;
forget();
press(dialog(), 'Delete');
await until(() => !card('Load', '%(old)s'));
await until(() => !seen('Rex: <dog>') && seen('the connected'));
return [said, widget('Load', 'run').options.values, ['Load', 'PlotHistory'].map(node => widget(node, 'run').value)]
"""
LAST = """
card('Load', '%(new)s').click();
press(card('Load', '%(new)s'), 'Delete');
await until(() => dialog());
press(dialog(), 'Delete');
await until(() => !card('Load', '%(new)s'));
return [widget('Load', 'run').options.values, widget('Load', 'run').value]
"""


def write(folder, method):
    (folder / "images").mkdir(parents=True)
    settings = {"method": method, "concept": {"placeholder_token": "<dog>", "class_word": "dog"}}
    info = RunInfo(settings=settings, dataset="", complete=True, steps=250, checkpoint="sd15.safetensors")
    info.write(folder)
    Image.new("RGB", (64, 64), "red").save(folder / "images" / "00.png")


@pytest.mark.parametrize("vue", [False, True], ids=["classic", "nodes 2.0"])
def test_runs_are_chosen_renamed_and_deleted_in_the_gallery(server, tmp_path, vue):
    runs, (old, new) = server.base / "output" / "personalize" / "runs", RUNS[vue]
    for digest, method in ((old, "TextBoost"), (new, "DreamBoothLoRA")):
        write(runs / digest, method)

    async def look():
        async with browser.open_editor(server.url, tmp_path / "profile") as page:
            values = {"old": old, "new": new, "vue": json.dumps(vue)}
            found = [await page.run(body % values, timeout=60) for body in (START, CHOOSE, RENAME, DELETE, LAST)]
            return [*found, page.errors]

    start, chosen, renamed, (said, left, values), last, errors = asyncio.run(look())
    assert start["text"].splitlines()[:4] == ["<dog>", "dog", "TextBoost, 250 steps", "sd15.safetensors"]
    open_height, folded, again = start["heights"]
    assert folded < open_height - 200 and again > folded + 200  # a connected result needs no gallery
    assert vue or again == open_height
    assert chosen == [f"<dog> TextBoost, 250 steps {old}", True, False]
    assert renamed == [f"Rex: <dog> TextBoost, 250 steps {old}", "Rex"]
    assert "Rex will be deleted" in said and not (runs / old).exists()
    assert f"<dog> DreamBoothLoRA, 250 steps {new}" in left and not any(old in label for label in left)
    assert values == ["", "the connected result"]  # no other run in its place, which nobody chose
    assert new not in str(last)
    assert errors == []
