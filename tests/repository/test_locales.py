"""Are the translations complete, without leftovers, and does the editor show them?"""

import asyncio
import json
import re
from pathlib import Path

import pytest

from personalize.tests.support import browser

pytestmark = pytest.mark.comfy
ROOT = Path(__file__).parents[2]
FILES = {path.parent.name: path for path in (ROOT / "locales").glob("*/nodeDefs.json")}


def schemas():
    import personalize

    async def listed():
        return await (await personalize.comfy_entrypoint()).get_node_list()

    return [node.define_schema() for node in asyncio.run(listed())]


def inputs(schema):
    """{key in a locale file: has it a tooltip?}; the editor looks up `preset.steps` as `preset_steps`."""
    from comfy_api.latest import io

    found = {}
    for each in schema.inputs:
        found[each.id] = bool(each.tooltip)
        if isinstance(each, io.DynamicCombo.Input):
            nested = [field for option in each.options for field in option.inputs]
            found |= {f"{each.id}_{field.id}": bool(field.tooltip) for field in nested}
        if isinstance(each, io.Autogrow.Input):
            slots = each.template
            found |= {f"{each.id}_{slots.prefix}{i}": False for i in range(slots.max)}
    return found


def translated(language):
    return json.loads(FILES[language].read_text(encoding="utf-8"))


def test_the_languages():
    assert FILES.keys() == {"zh", "zh-TW", "ja", "ko"}


@pytest.mark.parametrize("language", FILES)
def test_every_node_and_input_is_translated_and_nothing_else(language):
    nodes, known = translated(language), schemas()
    assert nodes.keys() == {schema.node_id for schema in known}
    for schema in known:
        node = nodes[schema.node_id]
        assert node.keys() == {"display_name", "description", "inputs", "outputs"}
        assert {key: "tooltip" in entry for key, entry in node["inputs"].items()} == inputs(schema)
        assert [entry["name"] for entry in node["inputs"].values()].count("") == 0
        outputs = {str(i): bool(output.tooltip) for i, output in enumerate(schema.outputs)}
        assert {key: "tooltip" in entry for key, entry in node["outputs"].items()} == outputs


@pytest.mark.parametrize("language", FILES)
def test_the_texts_hold_nothing_that_the_editor_would_take_for_code(language):
    """Its messages know `@:link`, `one | many` and `{name}`; an empty `{}` it leaves alone, in a tooltip."""
    for node in translated(language).values():
        labels = [node["display_name"], node["description"]]
        labels += [entry["name"] for part in ("inputs", "outputs") for entry in node[part].values()]
        tips = [entry.get("tooltip", "") for part in ("inputs", "outputs") for entry in node[part].values()]
        assert not re.search(r"[@|{}]", "".join(labels))
        assert not re.search(r"[@|{}]", "".join(tips).replace("{}", ""))


@pytest.mark.parametrize("language", FILES)
def test_the_words_of_the_scripts_are_translated_and_nothing_else(language):
    scripts = [path.read_text(encoding="utf-8") for path in (FILES[language].parents[2] / "js").glob("*.*js")]
    source = re.sub(r'"\s*\+ "', "", "\n".join(scripts))  # a text in two lines
    texts = json.loads(FILES[language].with_name("main.json").read_text(encoding="utf-8"))["personalize"]
    assert {*re.findall(r'\bt\("([^"]+)"', source)} <= texts.keys()
    assert [words for words in texts if f'"{words}"' not in source] == []
    for words, translated in texts.items():
        assert translated and sorted(re.findall(r"{\w+}", words)) == sorted(re.findall(r"{\w+}", translated))


def on_the_canvas():
    """Titles of the templates' nodes without their numbers, and names of an app's fields; nothing else has words."""
    found = set()
    for path in (ROOT / "workflows").glob("*.json"):
        workflow = json.loads(path.read_text(encoding="utf-8"))
        assert not workflow["groups"] and not [n for n in workflow["nodes"] if n["type"].endswith("Note")], path.name
        found |= {node["title"] for node in workflow["nodes"] if "title" in node}
        fields = workflow["extra"].get("linearData", {}).get("inputs", [])
        slots = [(str(node["id"]), slot) for node in workflow["nodes"] for slot in node.get("inputs", [])]
        found |= {slot["label"] for node, slot in slots if [node, slot["name"]] in fields}
    return {re.sub(r"^\d+ +", "", text) for text in found}


def test_what_stands_on_the_canvas_is_translated():
    listed = re.search(r"new Set\((\[.*?\])\)", (ROOT / "js" / "titles.js").read_text(encoding="utf-8"), re.DOTALL)
    assert set(json.loads(listed[1])) == on_the_canvas()
    for file in FILES.values():
        texts = json.loads(file.with_name("main.json").read_text(encoding="utf-8"))["personalize"]
        assert not on_the_canvas() - texts.keys(), file.parent.name


SHOWN = """
await app.loadGraphData(%s);
const titles = app.graph.nodes.map(node => node.title);
app.graph.clear();
const shown = {};
for (const type of %s) {
  const node = LiteGraph.createNode(type);
  app.graph.add(node);
  shown[type] = {title: node.title, widgets: {}, inputs: {}, outputs: node.outputs.map(o => o.localized_name)};
  for (const widget of node.widgets ?? []) shown[type].widgets[widget.name.replaceAll('.', '_')] = widget.label;
  for (const input of node.inputs) shown[type].inputs[input.name.replaceAll('.', '_')] = input.localized_name;
}
return [shown, titles]
"""


@pytest.fixture
def speak(server):
    """`speak(language)`: the editor's language from the next page on."""
    yield lambda language: server.client.post("/settings/Comfy.Locale", language)
    server.client.post("/settings/Comfy.Locale", "en")


@pytest.mark.slow
@pytest.mark.browser
@pytest.mark.parametrize("language", FILES)
def test_the_editor_shows_the_translations(server, speak, tmp_path, language):
    speak(language)
    nodes = translated(language)
    texts = json.loads(FILES[language].with_name("main.json").read_text(encoding="utf-8"))["personalize"]
    first = json.loads((ROOT / "workflows" / "learn_one_picture.json").read_text(encoding="utf-8"))

    async def look():
        async with browser.open_editor(server.url, tmp_path / "profile") as page:
            return await page.run(SHOWN % (json.dumps(first), json.dumps(list(nodes))))

    everything, titles = asyncio.run(look())
    assert f"2  {texts['One clear picture']}" in titles and texts["New images"] in titles
    for name, shown in everything.items():
        node = nodes[name]
        assert shown["title"] == node["display_name"]
        assert shown["outputs"] == [entry["name"] for entry in node["outputs"].values()]
        for key, label in shown["inputs"].items():
            assert (key, label) == (key, node["inputs"][key]["name"])
        own = {key: label for key, label in shown["widgets"].items() if key in node["inputs"]}
        assert own == {key: node["inputs"][key]["name"] for key in own}
        assert name != "PersonalizeTextBoost" or len(own) > 20  # the settings within the preset, too
