"""A finished run whose files somebody damaged: loading it gives one sentence, queueing its training again heals it.

Through a real server. Damage is done to a run that the server has just trained, in its folder.
"""

import itertools
import json
import os
import re
import struct

import pytest
import torch
from safetensors.torch import load_file, save_file

from personalize.tests.support import prompts

pytestmark = [pytest.mark.slow, pytest.mark.comfy]
NOTHING = r"^The run [0-9a-f]{16} has no result that can be loaded: queue its training again, or delete it\.$"
NOT_WHOLE = r"^The learned layer 'lora_te_\w+' is incomplete: queue the run's training again, or delete the run\.$"
OTHER_FAMILY = r": use the family of models that the run was trained on\.$"
fresh = itertools.count()


def read(path):
    """Copies of a file's tensors: without them the process would end when the file is cut short."""
    return {name: tensor.clone() for name, tensor in load_file(path).items()}


def bytes_in(name, data):
    return lambda folder: (folder / name).write_bytes(data)


def tensors_in(name, change):
    """Rewrites a safetensors file; `change` gets its tensors and returns others."""

    def damage(folder):
        save_file({k: v.contiguous() for k, v in change(read(folder / name)).items()}, folder / name)

    return damage


def values_in(**values):
    """Other values in run.json; `...` takes one out."""

    def damage(folder):
        about = json.loads((folder / "run.json").read_text()) | values
        (folder / "run.json").write_text(json.dumps({k: v for k, v in about.items() if v is not ...}))

    return damage


def both(first, second):
    return lambda folder: (first(folder), second(folder))


def of(part, change):
    """Changes the tensors of a LoRA whose names end so."""
    return lambda state: {key: change(value) if key.endswith(part) else value for key, value in state.items()}


def without(part):
    return lambda state: {key: value for key, value in state.items() if not key.endswith(part)}


LORA, CLIP, RUN, LAST = "lora.safetensors", "clip.safetensors", "run.json", "last.safetensors"
DAMAGES = {
    "a huge header": (bytes_in(LORA, struct.pack("<Q", 2**60) + b"{}"), NOTHING),
    "random bytes": (bytes_in(LORA, bytes(range(256)) * 40), NOTHING),
    "an empty file": (bytes_in(LORA, b""), NOTHING),
    "no file": (lambda folder: (folder / LORA).unlink(), NOTHING),
    "other shapes": (tensors_in(LORA, of("lora_up.weight", lambda t: t[:-1])), OTHER_FAMILY),
    "flat tensors": (tensors_in(LORA, of("lora_down.weight", lambda t: t.flatten())), NOT_WHOLE),
    "unknown layers": (tensors_in(LORA, lambda state: {f"x{k}": v for k, v in state.items()}), OTHER_FAMILY),
    "no alpha": (tensors_in(LORA, without(".alpha")), NOT_WHOLE),
    "no upper half": (tensors_in(LORA, without("lora_up.weight")), NOT_WHOLE),
    "words of another width": (tensors_in(CLIP, lambda s: {k: v[..., :-1] for k, v in s.items()}), OTHER_FAMILY),
    "no new word": (tensors_in(CLIP, without("<concept>")), NOTHING),
    "odd names": (tensors_in(CLIP, lambda s: {"tokens.x": next(iter(s.values()))}), NOTHING),
    "half the fixed outputs": (tensors_in(CLIP, of("fixed.0", lambda t: t[:1])), OTHER_FAMILY),
    "a word twice": (tensors_in(CLIP, lambda s: s | {"tokens.1.<concept>": torch.ones(1, 128)}), OTHER_FAMILY),
    "run.json that is no JSON": (bytes_in(RUN, b'{"complete": tr'), NOTHING),
    "run.json that is a list": (bytes_in(RUN, b"[1, 2]"), NOTHING),
    "run.json that is binary": (bytes_in(RUN, b"\xff\xfe\x00"), NOTHING),
    "run.json without settings": (values_in(settings=...), NOTHING),
    "run.json with null settings": (values_in(settings=None), NOTHING),
    "run.json without its end": (values_in(stop_reason=..., seconds=...), NOTHING),
    "run.json with words for steps": (values_in(steps="many"), NOTHING),
    "no log": (lambda folder: (folder / "steps.jsonl").unlink(), NOTHING),
    "a log in mid-line": (bytes_in("steps.jsonl", b'{"step": 1, "lo'), NOTHING),
    "nothing but run.json": (both(bytes_in(LORA, b""), both(bytes_in(CLIP, b""), bytes_in(LAST, b""))), NOTHING),
}


@pytest.fixture(scope="module")
def finished(server, object_info):
    """A finished run's folder, the prompt that trained it, and what it learned."""
    prompt = prompts.smallest(object_info, server.checkpoint)
    prompt["train"]["inputs"]["seed"] = 77
    before = set((server.base / "output" / "personalize" / "runs").glob("*"))
    assert prompts.run(server.client, prompt).kind == "success"
    (folder,) = set((server.base / "output" / "personalize" / "runs").glob("*")) - before
    return folder, prompt, [read(folder / name) for name in (LORA, CLIP)]


def loading(prompt, run):
    """Loads a run and draws nothing: its result is saved."""
    inputs = {"model": ["checkpoint", 0], "clip": ["checkpoint", 1], "run": run}
    changes = {"load": ("PersonalizeLoad", inputs), "save.result": ["load", 2], "save.name": f"loaded_{next(fresh)}"}
    return prompts.changed(
        prompt, changes | {"train": prompts.DROP, "recipe": prompts.DROP, "references": prompts.DROP}
    )


def changed_on_disk(folder):
    """ComfyUI keeps what Load returned until run.json changes."""
    os.utime(folder / RUN, (next(fresh), next(fresh)))


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_run_gets_one_sentence_and_heals(server, finished, damage):
    folder, prompt, learned = finished
    damage, sentence = DAMAGES[damage]
    damage(folder)
    changed_on_disk(folder)
    outcome = prompts.run(server.client, loading(prompt, folder.name))
    assert outcome.kind == "failed" and re.search(sentence, outcome.message), outcome
    assert not prompts.faults(outcome.message)
    assert "PersonalizeLoad" in server.client.object_info()  # its list of runs reads every run.json

    again = prompts.changed(prompt, {"train.preview_prompts": f"not yet cached {next(fresh)}"})
    assert prompts.run(server.client, again).kind == "success"
    assert json.loads((folder / RUN).read_text())["complete"]
    for name, before in zip((LORA, CLIP), learned, strict=True):
        now = read(folder / name)
        assert now.keys() == before.keys() and all(torch.equal(now[key], before[key]) for key in now)
    changed_on_disk(folder)
    assert prompts.run(server.client, loading(prompt, f"any words {folder.name}")).kind == "success"


def test_images_that_are_gone_do_not_stop_a_finished_run(server, finished):
    folder, prompt, _ = finished
    for file in (folder / "images").iterdir():
        file.write_bytes(b"no picture")
    again = prompts.changed(prompt, {"train.preview_prompts": f"not yet cached {next(fresh)}"})
    assert prompts.run(server.client, again).kind == "success"
