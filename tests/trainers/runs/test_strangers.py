"""Files of strangers: a result whose token would change every prompt, a checkpoint that fits nothing. One sentence."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from personalize.trainers.runs import result as results
from personalize.trainers.runs.folder import RunFolder
from personalize.trainers.runs.info import RunInfo
from personalize.trainers.training import state


def complete(tokens):
    """The tensors and the header of a personalized file."""
    token = next(iter(tokens))
    settings = {"method": "TextBoost", "concept": {"placeholder_token": token}}
    result = results.RunResult(
        folder=Path("x"), settings=settings, dataset="", lora={}, tokens=tokens, fixed_outputs=(), history=[],
        stop_reason="done", seconds=1.0,
    )  # fmt: skip
    return results.complete(result, "mine")


ROW = torch.ones(1, 32)


@pytest.mark.parametrize(
    ("tokens", "sentence"),
    [
        ({"man": (ROW,)}, "^This file names its placeholder token 'man', which would change other prompts: save"),
        ({"a": (ROW,)}, "token 'a', which would"),
        ({"": (ROW,)}, "token '', which would"),
        ({"a photo": (ROW,)}, "token 'a photo', which would"),
        ({"<dog>": (ROW,), ",": (ROW,)}, "token ',', which would"),
        ({"<dog>": (ROW.int(),)}, "^This file does not hold 1 to 75 vectors for its placeholder token <dog>: save"),
        ({"<dog>": (ROW[:0],)}, "does not hold 1 to 75 vectors"),
        ({"<dog>": (ROW.expand(100, -1),)}, "does not hold 1 to 75 vectors"),
        ({"<dog>": (ROW[0],)}, "does not hold 1 to 75 vectors"),
    ],
    ids=str,
)
def test_a_token_that_cannot_be_one_is_refused(tokens, sentence):
    with pytest.raises(ValueError, match=sentence):
        results.read_complete(*complete(tokens), Path("mine.safetensors"))


def test_a_token_as_ours_is_read():
    for tokens in ({"<dog>": (ROW,)}, {"sks9": (ROW.expand(75, -1),), "<left>": (ROW.half(),)}):
        assert results.read_complete(*complete(tokens), Path("mine.safetensors")).tokens.keys() == tokens.keys()


def stage(**changes):
    params, generator = (torch.ones(2, 3),), torch.Generator().get_state()
    whole = {"step": 3, "seconds": 1.0, "params": params, "optimizer": {}, "scaler": {}, "generator": generator}
    return state.StageState(**whole | changes)


ABOUT = {"step": 3, "seconds": 1.0, "scaler": {}, "groups": [], "params": 1}


ODD = (
    {"step": "3"},
    {"groups": [{"d": "1"}]},
    {"groups": 7},
    {"step": -1},
    {"seconds": float("inf")},
    {"scaler": 7},
    {"params": 2},
    {"params": None},
)


@pytest.mark.parametrize(
    "about",
    [
        "{}",
        "[7]",
        "7",
        "[null]",
        "[" * 100_000,
        json.dumps([ABOUT, ABOUT]),
        *(json.dumps([ABOUT | odd]) for odd in ODD),
    ],
    ids=lambda text: text[:60],
)
def test_a_crafted_checkpoint_counts_as_damaged(tmp_path, about):
    """Its checksum is right: whoever writes the file can compute it."""
    state.save((stage(),), tmp_path / "a.safetensors")
    tensors = load_file(tmp_path / "a.safetensors")
    checksum = str(state._checksum(tensors))
    save_file(tensors, tmp_path / "a.safetensors", metadata={"stages": about, "checksum": checksum})
    assert not state.load(tmp_path / "a.safetensors")


@pytest.mark.parametrize("name", ["0", "0.optimizer.x.step", "0.generator"])
def test_odd_tensors_of_a_checkpoint_count_as_damage(tmp_path, name):
    state.save((stage(),), tmp_path / "a.safetensors")
    tensors = load_file(tmp_path / "a.safetensors") | {name: torch.ones(3)}
    metadata = {"stages": json.dumps([ABOUT]), "checksum": str(state._checksum(tensors))}
    save_file(tensors, tmp_path / "a.safetensors", metadata=metadata)
    assert state.load(tmp_path / "a.safetensors") is None


@pytest.mark.parametrize("values", [{"seconds": float("inf")}, {"seconds": float("nan")}, {"steps": -1}], ids=str)
def test_a_run_of_impossible_numbers_cannot_be_read(values):
    good = {"settings": {"method": "x", "concept": {"placeholder_token": "<dog>"}}, "dataset": "", "origin": {}}
    good |= {"complete": True, "stop_reason": "", "seconds": 1.0, "steps": 3, "stops": []}
    assert RunInfo.parse(good).steps == 3
    with pytest.raises(ValueError):
        RunInfo.parse(good | values)


@pytest.mark.parametrize("line", ["[" * 100_000, "7", "[]", "null"])
def test_a_line_of_the_log_that_is_no_step_cannot_be_read(tmp_path, line):
    (tmp_path / "steps.jsonl").write_text(f"{line}\n")
    with pytest.raises(ValueError):
        RunFolder(tmp_path).history(1)
