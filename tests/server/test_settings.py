"""Settings that cannot work are refused when a prompt is queued: one sentence at the node, before anything runs."""

import json
import re
import urllib.error
from importlib.util import find_spec

import pytest

from personalize.tests.support import prompts

pytestmark = [pytest.mark.slow, pytest.mark.comfy]
RANKS = {"preset": "single image", "preset.min_rank": 100, "preset.lora_rank": 64}
GROWS = r"The min_rank of T-LoRA, 100, is above its lora_rank, 64: lower it\."
DIGITS = {"preset": "DreamBooth-LoRA", "preset.fixed_parts": "12"}
OTHER_OPTIMIZER = r"The optimizer adamw8bit needs the package bitsandbytes, .* set optimizer to adamw, or install"


def recipe(kind, **inputs):
    return {"recipe": (f"Personalize{kind}", {name.replace("__", "."): value for name, value in inputs.items()})}


ROWS = {
    "a rank that grows with the noise": (recipe("TLoRA", **RANKS), "recipe", GROWS),
    "captions that do not exist": (
        {"recipe.preset.captions": "none.txt"}, "recipe", r"The captions file 'none\.txt' cannot be read"
    ),
    "an optimizer whose package is missing": (
        recipe("LoRA", preset="short", preset__optimizer="adamw8bit"), "recipe", OTHER_OPTIMIZER
    ),
    "a CLIP that is missing": (
        recipe("TextualInversion", preset="short", preset__initializer_strategy="best"), "recipe", "CLIP"
    ),
    "digits of a monitor": (
        {"stopper": ("PersonalizeDVAR", DIGITS), "train.stopper": ["stopper", 0]}, "stopper",
        "fixed_parts of DVAR is '12': write five digits",
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def good(server, object_info):
    return prompts.smallest(object_info, server.checkpoint)


def refused(server, prompt):
    """What is wrong with each node, as the host answers to whoever queues the prompt."""
    with pytest.raises(urllib.error.HTTPError) as answer:
        server.client.post("/prompt", {"prompt": prompt})
    problems = json.loads(answer.value.read())["node_errors"]
    return {node: [error["details"] for error in problem["errors"]] for node, problem in problems.items()}


@pytest.mark.parametrize(("changes", "node", "sentence"), ROWS.values(), ids=ROWS)
def test_settings_that_cannot_work_are_refused_when_queued(server, good, changes, node, sentence):
    if "bitsandbytes" in sentence and find_spec("bitsandbytes"):
        pytest.skip("bitsandbytes is installed: its optimizer can run")
    said = refused(server, prompts.changed(good, changes))
    assert list(said) == [node] and len(said[node]) == 1
    assert re.search(f"^preset - .*{sentence}", said[node][0]), said


def test_what_the_host_refuses_is_said_once(server, good):
    said = refused(server, prompts.changed(good, {**recipe("TLoRA", **RANKS), "recipe.preset.steps": 0}))
    assert said == {"recipe": ["preset.steps"]}


def test_settings_that_come_through_a_link_are_checked_when_they_arrive(server, good):
    link = {**recipe("TLoRA", **RANKS), "rank": ("PrimitiveInt", {"value": 64}), "recipe.preset.lora_rank": ["rank", 0]}
    outcome = prompts.run(server.client, prompts.changed(good, link))
    assert outcome.kind == "failed" and outcome.node == "PersonalizeTLoRA"
    assert re.fullmatch(GROWS, outcome.message)
