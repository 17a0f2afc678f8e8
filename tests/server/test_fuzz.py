"""Prompts that nobody would write: whatever an API client sends, the server lives and nobody reads Python of ours.

The smallest good prompts, mutated by a seeded generator. FUZZ_PROMPTS sets their number, FUZZ_SEED the seed.
"""

import os
import random
import time
from collections import Counter

import pytest

from personalize.tests.support import prompts, waiting
from personalize.tests.support.prompts import DROP, Outcome

pytestmark = [pytest.mark.slow, pytest.mark.comfy]

NUMBER, SEED = int(os.environ.get("FUZZ_PROMPTS", "300")), int(os.environ.get("FUZZ_SEED", "1"))
# Nothing in here makes a training long: a number is small or refused. What would if it were missing or 0 is kept.
KEPT = {"preset.steps": 1, "preset.views": 1, "preset.batch_size": 1, "preset.knowledge_weight": 0.0, "resolution": 64}
VALUES = (
    *(None, True, False, 0, 1, -1, 2, 3, 33, 2**31, 2**63, -(2**63), 2**64, 10**30, 0.5, -0.0, 1e-9, 1e308),
    *(float("nan"), float("inf"), -float("inf"), "", " ", "nan", "inf", "7", "-7", "1e3", "0x10", "None", "{}", "[]"),
    *("../..", "/etc/passwd", "C:\\Windows", "a\0b", "\ud83d", "\U0001f436" * 50, "b'\\xff'", "x" * 5000, "%s %n {0}"),
    *("\n\n", "\u202e\u0000", "<left>", "<concept>", "(a:1.2)", "embedding:x", "dog", "猫" * 20, "1, 1-3", "benchmark"),
    *([], [[]], [1, 2, 3], ["image"], [None, None], {}, {"a": 1}, {"__value__": [1, 2]}),
    *({"__value__": None}, {"__type__": "STRING"}, {"preset": "style"}, [["checkpoint", 0], 0]),
)
NAMES = (
    "images.image1",
    "images.image99",
    "images.",
    "preset.",
    "preset.bogus",
    "preset.steps.steps",
    "run",
    "unknown",
)
PRESETS = ("readme", "style", "nonsense", "", None, 7, ["recipe", 0], {"preset": "readme"})


def graphs(object_info, checkpoint):
    """Three cheap prompts, which together hold every node of the pack."""
    train = prompts.changed(prompts.smallest(object_info, checkpoint), {"train.preview_steps": 1})
    models = {"model": ["checkpoint", 0], "clip": ["checkpoint", 1]}
    strengths = {"strength_unet": 1.0, "strength_text_encoder": 1.0, "full_precision": False}
    apply = ("PersonalizeApply", {**models, "result": ["train", 2], **strengths})
    text = ("CLIPTextEncode", {"clip": ["apply", 1], "text": "a <concept>"})
    shown = ("ConditioningZeroOut", {"conditioning": ["text", 0]})
    use = {"apply": apply, "text": text, "zero": shown, "any": ("PreviewAny", {"source": ["zero", 0]})}
    run = "0123456789abcdef"
    load = {"load": ("PersonalizeLoad", {**models, "run": run, "full_precision": True}), "save.result": ["load", 2]}
    listing = {"runs": ("PersonalizeRuns", {"action": "list", "run": run})}
    return [train, prompts.changed(train, use), prompts.changed(train, load | listing)]


def mutated(prompt, draw):
    """The prompt with one to four things changed at random, in nodes of the pack.

    Links that lead nowhere go only into inputs that ComfyUI looks at: one that it does not know ends its worker.
    """
    prompt = prompts.changed(prompt, {})
    ours = [name for name, node in prompt.items() if node["class_type"].startswith("Personalize")]
    known = {name: set(prompt[name]["inputs"]) for name in ours}
    kinds = draw.choices(("value", "link", "drop", "add", "preset"), (8, 4, 2, 2, 1), k=draw.randint(1, 4))
    if swapped := draw.random() < 0.2:
        prompt[draw.choice(ours)]["class_type"] = prompt[draw.choice(ours)]["class_type"]
    for kind in kinds:
        node = draw.choice(ours)
        inputs = prompt[node]["inputs"]
        name = draw.choice(list(inputs) or ["empty"]) if kind != "add" else draw.choice(NAMES)
        lost = not swapped and name in known[node] and not name.startswith(("preset", "images"))
        link = draw.choice([["nowhere", 0], ["image", 9], ["train", -1]]) if lost and draw.random() < 0.3 else None
        link = link or [*draw.choice((("image", 0), ("image", 1), ("checkpoint", 2), ("train", 3), (node, 0)))]
        value = DROP if kind == "drop" else link if kind == "link" else draw.choice(VALUES)
        if kind == "preset":
            name, value = "preset", draw.choice(PRESETS)
        if name in inputs and not (name in KEPT and (value is DROP or is_zero(value))):
            prompt = prompts.changed(prompt, {f"{node}.{name}": value})
        elif value is not DROP:
            prompt = prompts.changed(prompt, {f"{node}.{name}": KEPT.get(name, value)})
    return prompt


def extra_data(draw):
    """What editors send beside a prompt, in hidden inputs: their workflow, of whatever type."""
    value = draw.choice(VALUES)
    named = {"workflow": value}, {"workflow": {"id": value}}, {str(value)[:99]: value}, value
    return {"extra_pnginfo": draw.choice(named)} if draw.random() < 0.5 else {}


def is_zero(value):
    """Whether ComfyUI makes 0 of it, or leaves it out: for a resolution that is the model's own."""
    return value is None or (isinstance(value, (int, float)) and abs(value) < 1)


def in_time(server, queued, seconds):
    """How every queued prompt ended."""

    def alive():
        server.client.alive()
        assert "Exception in thread" not in server.log, "ComfyUI's worker ended"

    waiting.until(lambda: not any(server.client.get("/queue").values()), alive, seconds)
    return [one if isinstance(one, Outcome) else prompts.ended(server.client, one) for one in queued]


def test_no_prompt_shows_python_or_ends_the_server(server, object_info):
    draw, started = random.Random(SEED), time.monotonic()
    good = graphs(object_info, server.checkpoint)
    sent = [mutated(draw.choice(good), draw) for _ in range(NUMBER)]
    extra = [extra_data(draw) for _ in sent]
    queued = [prompts.queue(server.client, prompt, extra_data=more) for prompt, more in zip(sent, extra, strict=True)]
    ended = in_time(server, queued, waiting.LIMIT + 30 * NUMBER)
    counts = Counter(f"{one.kind}, {'by the pack' if one.ours else 'by ComfyUI'}" for one in ended)
    print(f"{NUMBER} prompts in {time.monotonic() - started:.0f} seconds:", dict(counts))
    bad = {one.message: prompts.faults(one.message) for one in ended if one.ours}
    assert not {message: faults for message, faults in bad.items() if faults}
    assert len(counts) >= 4, "the mutations reach too little"
    seed = {"train.seed": 12345}
    assert prompts.run(server.client, prompts.changed(good[1], seed)).kind == "success"


EXTRA = [
    "text",
    7,
    ["a"],
    {"workflow": "text"},
    {"workflow": ["id"]},
    {"workflow": {"id": {"a": 1}}},
    {"\U0001f436": "dog"},
]


def test_a_client_may_send_any_workflow(server, object_info):
    """A training that shows previews and plots its history, whatever the hidden inputs are."""
    good = prompts.changed(
        prompts.smallest(object_info, server.checkpoint), {"train.preview_every": 1, "train.preview_steps": 1}
    )
    inputs = prompts.defaults(object_info["PersonalizePlotHistory"]["input"]) | {"result": ["train", 2]}
    plot = {"plot": ("PersonalizePlotHistory", inputs | {"scale": "linear"})}
    for seed, extra in enumerate(EXTRA):
        prompt = prompts.changed(good, plot | {"train.seed": 700 + seed})
        outcome = prompts.run(server.client, prompt, extra_data={"extra_pnginfo": extra})
        assert outcome.kind == "success", (extra, outcome)
