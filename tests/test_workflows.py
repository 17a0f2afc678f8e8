"""Each workflow on a real server with the tiny model: does it train, draw, and use a finished training again?"""

import json
from pathlib import Path

import pytest

from personalize.demo import show
from personalize.demo.workflow import override, to_api
from personalize.tests import host

ROOT = Path(__file__).resolve().parent.parent
pytestmark = [pytest.mark.slow, pytest.mark.comfy]


@pytest.fixture(scope="module")
def textboost(object_info):
    """The API prompt of workflows/textboost.json with the demo's values, cut to a few steps."""
    prompt = to_api(show.read_json(ROOT / "workflows" / "textboost.json"), object_info)
    return override(override(prompt, host.demo_overrides()), host.QUICK)


def one_picture(server, prompt, title):
    return server.images(server.run(prompt))[show.node_titled(prompt, title)][0].tobytes()


def pictures(server, prompt):
    images = server.images(server.run(prompt))
    return [images[show.node_titled(prompt, title)][0].tobytes() for title in (show.UNTRAINED, show.TRAINED)]


def logs(server):
    """{log of a training: when it was last written}"""
    return {log: log.stat().st_mtime_ns for log in (server.base / "output").glob("personalize/runs/*/steps.jsonl")}


def test_training_changes_the_trained_picture_only_and_happens_once(server, textboost):
    earlier = logs(server)  # other tests train on the same server
    untrained, trained = pictures(server, textboost)
    assert untrained != trained
    before = logs(server)
    (log,) = before.keys() - earlier.keys()
    assert len(log.read_text().splitlines()) == 3

    # The untrained half once more, drawn afresh because another prompt came between: the base model is untouched.
    alone = {number: node for number, node in textboost.items() if number != show.node_titled(textboost, show.TRAINED)}
    server.run(override(alone, {"KSampler": {"cfg": 7.0}}))
    assert one_picture(server, alone, show.UNTRAINED) == untrained

    other = override(textboost, {"Prompt": {"value": "a sketch of a {} at night"}})
    assert pictures(server, other)[1] != trained
    # Back again: the host has forgotten, the folder of the run has not.
    server.client.post("/free", {"unload_models": True, "free_memory": True})
    assert pictures(server, textboost) == [untrained, trained]
    assert logs(server) == before


def test_another_seed_is_another_training(server, textboost):
    before = logs(server)
    pictures(server, override(textboost, {"PersonalizeTrain": {"seed": 1}}))
    assert len(logs(server)) == len(before) + 1


def test_every_workflow_has_a_note_and_its_picture():
    for path in (ROOT / "workflows").glob("*.json"):
        kinds = [node["type"] for node in json.loads(path.read_text(encoding="utf-8"))["nodes"]]
        assert "MarkdownNote" in kinds and path.with_suffix(".jpg").exists()
