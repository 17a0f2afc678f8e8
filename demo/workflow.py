"""From a workflow as the editor saves it to a prompt as the server's API takes it, with some values changed.

Standard library only. The editor does this in JavaScript when it queues; tests/browser/test_editor.py compares the
two. It knows the core nodes and those of this pack, and refuses what it does not know.
"""

import json

from .client import HostError

# Types that the editor shows as a widget rather than as a socket, so that their value stands in `widgets_values`.
WIDGETS = {"INT", "FLOAT", "STRING", "BOOLEAN", "COMBO", "COLOR", "MARKDOWN", "TEXTAREA", "COMFY_DYNAMICCOMBO_V3"}
UPLOADS = {"image_upload", "video_upload", "animated_image_upload"}
ALWAYS, MUTED, BYPASSED = 0, 2, 4
# Nodes that exist in the editor only.
NOTES = {"Note", "MarkdownNote"}


def to_api(workflow, object_info):
    """The API prompt of a saved workflow: {node id: {"class_type", "inputs", "_meta"}}.

    Does what the editor's own `graphToPrompt` does for the nodes of this pack and the core ones: links through
    reroutes and bypassed nodes, muted nodes, dynamic inputs, seeds with their hidden control. Subgraphs are refused.
    """
    graph = Graph(workflow)
    prompt = {}
    for node in graph.nodes.values():
        kind = node["type"]
        if kind in NOTES or kind in ("Reroute", "PrimitiveNode") or node.get("mode", ALWAYS) in (MUTED, BYPASSED):
            continue
        if kind not in object_info:
            reason = "is a subgraph, which is not supported" if kind in graph.subgraphs else "is not known here"
            raise HostError(f"The node {node.get('title', kind)} (node {node['id']}, {kind}) {reason}.")
        inputs = widget_inputs(node, object_info[kind])
        for slot in node.get("inputs") or []:
            source = graph.source(slot.get("link"), slot["type"])
            if source is not None:
                inputs[slot["name"]] = source
        title = node.get("title") or object_info[kind].get("display_name") or kind
        prompt[str(node["id"])] = {"class_type": kind, "inputs": inputs, "_meta": {"title": title}}
    return prompt


class Graph:
    """The nodes and links of a saved workflow."""

    def __init__(self, workflow):
        self.nodes = {node["id"]: node for node in workflow["nodes"]}
        self.links = {link[0]: link for link in workflow["links"]}
        self.subgraphs = {graph["id"] for graph in (workflow.get("definitions") or {}).get("subgraphs", [])}

    def source(self, link_id, wanted):
        """What a link brings: ["node", slot], a primitive's value, or None where nothing executes at its other end."""
        if link_id is None or link_id not in self.links:
            return None
        _, origin, slot, *_ = self.links[link_id]
        node = self.nodes[origin]
        mode = node.get("mode", ALWAYS)
        if node["type"] == "PrimitiveNode":
            return node["widgets_values"][0]
        if mode == MUTED:
            return None
        if mode == BYPASSED:
            through = bypass(node, slot, wanted)
            return None if through is None else self.source(through.get("link"), wanted)
        if node["type"] == "Reroute":
            return self.source(node["inputs"][0].get("link"), wanted)
        return [str(origin), slot]


def bypass(node, slot, wanted):
    """The input that stands in for an output of a bypassed node: the same slot if it fits, else the first that fits."""
    inputs = node.get("inputs") or []
    if wanted == "*":
        return (inputs[slot] if slot < len(inputs) else inputs[0]) if inputs else None
    if slot < len(inputs) and fits(inputs[slot]["type"], wanted):
        return inputs[slot]
    return next((i for i in inputs if i["type"] == wanted), next((i for i in inputs if fits(i["type"], wanted)), None))


def fits(one, other):
    """Whether two socket types connect; a type may be a comma separated list."""
    one, other = str(one).upper().split(","), str(other).upper().split(",")
    return "*" in one or "*" in other or bool(set(one) & set(other))


def widget_inputs(node, definition):
    """The values of a node's widgets by input name."""
    # A list on its own would be taken for a link.
    return {
        name: {"__value__": value} if isinstance(value, list) else value for name, _, value in widgets(node, definition)
    }


def widgets(node, definition):
    """(input name, position in `widgets_values`, value) of each widget, in the order in which the editor makes them."""
    position, values = 0, node.get("widgets_values") or []
    for section in ("required", "optional"):
        position = yield from read_widgets(definition["input"].get(section) or {}, values, position)


def read_widgets(specs, values, position, prefix=""):
    """One widget after the other, with those that the choice in a dynamic combo brings; returns the next position."""
    for name, spec in specs.items():
        kind, options = spec[0], (spec[1] if len(spec) > 1 else None) or {}
        kind = "COMBO" if isinstance(kind, list) else options.get("widgetType", kind)
        if kind not in WIDGETS or options.get("forceInput"):
            continue
        value = values[position] if position < len(values) else default(kind, spec[0], options)
        yield prefix + name, position, value
        position += 1
        if kind == "COMFY_DYNAMICCOMBO_V3":
            chosen = next((option["inputs"] for option in options["options"] if option["key"] == value), {})
            for section in ("required", "optional"):
                position = yield from read_widgets(chosen.get(section) or {}, values, position, f"{prefix}{name}.")
        position += hidden_slots(prefix + name, kind, options)
    # The editor puts the upload button of a file input after the other widgets; its value stands in the file, too.
    return position + any(UPLOADS & set(spec[1] if len(spec) > 1 else {}) for spec in specs.values())


def hidden_slots(name, kind, options):
    """How many more values follow a widget: the control after generate, and for a combo its filter too."""
    control = options.get("control_after_generate")
    if kind == "INT" and control is None:
        control = name in ("seed", "noise_seed")
    if not control:
        return 0
    return 2 if kind == "COMBO" else 1


def default(kind, choices, options):
    """The value the editor gives a widget that a saved workflow says nothing about."""
    if "default" in options:
        return options["default"]
    if kind == "COMFY_DYNAMICCOMBO_V3":
        return options["options"][0]["key"]
    if kind == "COMBO":
        choices = choices if isinstance(choices, list) else options.get("options", [])
        return choices[0] if choices else None
    return {"INT": 0, "FLOAT": 0.0, "BOOLEAN": False}.get(kind, "")


def override_workflow(workflow, object_info, overrides):
    """A copy of a saved workflow with the same changes as `override` makes, where they are values of widgets."""
    workflow = json.loads(json.dumps(workflow))
    for node in workflow["nodes"]:
        for name, position, _ in list(widgets(node, object_info.get(node["type"], {"input": {}}))):
            for key in (node["type"], node.get("title")):
                if name in overrides.get(key, {}):
                    node["widgets_values"][position] = overrides[key][name]
    return workflow


def override(prompt, overrides):
    """A copy of the prompt with some inputs changed: {class type or node title: {input: value}}.

    A name that fits no node, or an input that the node does not have, is an error: an override that changes nothing
    would go unnoticed. Keys that begin with "_" are comments.
    """
    prompt = json.loads(json.dumps(prompt))
    for name, changes in overrides.items():
        if name.startswith("_"):
            continue
        nodes = [n for n in prompt.values() if name in (n["class_type"], n.get("_meta", {}).get("title"))]
        if not nodes:
            raise HostError(f"An override names {name}, which is no node of the workflow.")
        for node in nodes:
            for key, value in changes.items():
                if key not in node["inputs"]:
                    raise HostError(f"An override names {name}.{key}, which that node does not have.")
                node["inputs"][key] = value
    return prompt
