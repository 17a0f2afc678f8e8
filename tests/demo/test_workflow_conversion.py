"""Does a saved workflow become the prompt that the editor would queue? (test_browser.py asks the editor itself.)"""

import pytest

from personalize.demo import workflow
from personalize.demo.client import HostError

DEFINITIONS = {
    "Loader": {"input": {"required": {"ckpt_name": [["a.safetensors"]]}}, "display_name": "Load Checkpoint"},
    "Encode": {"input": {"required": {"text": ["STRING", {"multiline": True}], "clip": ["CLIP"]}}},
    "Sample": {
        "input": {
            "required": {
                "model": ["MODEL"],
                "seed": ["INT", {"control_after_generate": True}],
                "steps": ["INT", {"default": 20}],
                "images": ["COMFY_AUTOGROW_V3", {"template": {"prefix": "image"}}],
                "preset": [
                    "COMFY_DYNAMICCOMBO_V3",
                    {
                        "options": [
                            {"key": "small", "inputs": {"required": {"rank": ["INT", {"default": 4}]}}},
                            {"key": "none", "inputs": {"required": {}}},
                        ]
                    },
                ],
                "cfg": ["FLOAT", {"default": 8.0}],
            },
            "optional": {"forced": ["INT", {"forceInput": True}], "name": ["STRING", {"default": "x"}]},
        }
    },
    "Picture": {"input": {"required": {"image": [["a.png"], {"image_upload": True}]}}},
}


def node(number, kind, inputs=(), values=(), mode=0, outputs=("MODEL",), **more):
    """A node as a workflow stores it; an input is (name, type, link)."""
    slots = [{"name": name, "type": kind, "link": link} for name, kind, link in inputs]
    outs = [{"name": kind, "type": kind} for kind in outputs]
    return {"id": number, "type": kind, "inputs": slots, "outputs": outs, "widgets_values": list(values)} | {
        "mode": mode,
        **more,
    }


def convert(nodes, links):
    return workflow.to_api({"nodes": nodes, "links": links, "version": 0.4}, DEFINITIONS)


def sample(link, values=(7, "randomize", 30, "small", 16, 2.5, "dog")):
    return node(2, "Sample", [("model", "MODEL", link)], values)


def test_values_follow_the_order_of_the_inputs():
    prompt = convert([node(1, "Loader", values=["a.safetensors"]), sample(9)], [[9, 1, 0, 2, 0, "MODEL"]])
    assert prompt["1"] == {
        "class_type": "Loader",
        "inputs": {"ckpt_name": "a.safetensors"},
        "_meta": {"title": "Load Checkpoint"},
    }
    # The word after the seed is the editor's own and never reaches the prompt; "forced" has no value of its own.
    assert prompt["2"]["inputs"] == {
        "model": ["1", 0],
        "seed": 7,
        "steps": 30,
        "preset": "small",
        "preset.rank": 16,
        "cfg": 2.5,
        "name": "dog",
    }


def test_a_dynamic_combo_without_fields_takes_one_value():
    inputs = convert([sample(None, (7, "fixed", 30, "none", 2.5, "dog"))], [])["2"]["inputs"]
    assert inputs["preset"] == "none" and inputs["cfg"] == 2.5 and "preset.rank" not in inputs


def test_values_that_an_older_workflow_lacks_take_their_defaults():
    inputs = convert([sample(None, (7, "fixed", 30))], [])["2"]["inputs"]
    assert (inputs["preset"], inputs["preset.rank"], inputs["cfg"], inputs["name"]) == ("small", 4, 8.0, "x")


def test_a_link_wins_over_the_value_of_the_same_input():
    nodes = [node(1, "Loader", values=["a.safetensors"]), sample(None)]
    nodes[1]["inputs"] += [
        {"name": "steps", "type": "INT", "link": 4, "widget": {"name": "steps"}},
        {"name": "images.image0", "type": "IMAGE", "link": 5},
    ]
    inputs = convert(nodes, [[4, 1, 2, 2, 1, "INT"], [5, 1, 1, 2, 2, "IMAGE"]])["2"]["inputs"]
    assert inputs["steps"] == ["1", 2] and inputs["images.image0"] == ["1", 1] and inputs["cfg"] == 2.5


def test_reroutes_and_bypassed_nodes_are_looked_through_and_notes_dropped():
    nodes = [
        node(1, "Loader", values=["a.safetensors"]),
        node(3, "Reroute", [("", "*", 1)], outputs=("MODEL",)),
        node(4, "Sample", [("other", "CLIP", None), ("model", "MODEL", 2)], mode=workflow.BYPASSED),
        node(5, "Note", values=["read me"], outputs=()),
        sample(3),
    ]
    prompt = convert(nodes, [[1, 1, 0, 3, 0, "MODEL"], [2, 3, 0, 4, 1, "MODEL"], [3, 4, 0, 2, 0, "MODEL"]])
    assert set(prompt) == {"1", "2"} and prompt["2"]["inputs"]["model"] == ["1", 0]


def test_a_muted_node_takes_its_links_along():
    nodes = [node(1, "Loader", values=["a.safetensors"], mode=workflow.MUTED), sample(9)]
    prompt = convert(nodes, [[9, 1, 0, 2, 0, "MODEL"]])
    assert set(prompt) == {"2"} and "model" not in prompt["2"]["inputs"]


def test_a_primitive_hands_over_its_value():
    nodes = [node(1, "PrimitiveNode", values=[42, "fixed"], outputs=("INT",)), sample(None)]
    nodes[1]["inputs"].append({"name": "seed", "type": "INT", "link": 4, "widget": {"name": "seed"}})
    assert convert(nodes, [[4, 1, 0, 2, 1, "INT"]])["2"]["inputs"]["seed"] == 42


def test_an_upload_button_takes_a_value_of_its_own():
    assert convert([node(1, "Picture", values=["a.png", "image"])], [])["1"]["inputs"] == {"image": "a.png"}


def test_an_unknown_node_is_named():
    with pytest.raises(HostError, match=r"Dream \(node 8, PersonalizeDream\) is not known"):
        convert([node(8, "PersonalizeDream", title="Dream")], [])


def test_overrides_find_nodes_by_class_and_by_title():
    prompt = convert([node(1, "Loader", values=["a.safetensors"]), sample(None)], [])
    changed = workflow.override(
        prompt, {"_what": "a comment", "Load Checkpoint": {"ckpt_name": "b"}, "Sample": {"preset.rank": 2}}
    )
    assert changed["1"]["inputs"]["ckpt_name"] == "b" and changed["2"]["inputs"]["preset.rank"] == 2
    assert prompt["1"]["inputs"]["ckpt_name"] == "a.safetensors"


def test_a_workflow_takes_the_same_overrides_as_its_prompt():
    saved = {"nodes": [node(1, "Loader", values=["a"], title="Mine"), sample(None)], "links": []}
    changes = {"Mine": {"ckpt_name": "b"}, "Sample": {"preset.rank": 2, "cfg": 1.5}}
    changed = workflow.override_workflow(saved, DEFINITIONS, changes)
    assert changed["nodes"][1]["widgets_values"] == [7, "randomize", 30, "small", 2, 1.5, "dog"]
    prompt = workflow.to_api(saved, DEFINITIONS)
    assert workflow.to_api(changed, DEFINITIONS) == workflow.override(prompt, changes)


@pytest.mark.parametrize("overrides", [{"Nobody": {"x": 1}}, {"Sample": {"nothing": 1}}])
def test_an_override_that_would_change_nothing_is_an_error(overrides):
    with pytest.raises(HostError, match="An override names"):
        workflow.override(convert([sample(None)], []), overrides)
