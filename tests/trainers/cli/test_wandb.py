"""--wandb: does every step arrive under the history's names, once, and what is said where the package is missing?"""

import json
import sys

import pytest

from personalize.tests.support import drawn_subjects
from personalize.trainers import __main__ as command

# A package of that name which writes down what it is given.
STAND_IN = """
import json
from pathlib import Path

FILE = Path(__file__).with_name("wandb.jsonl")

def note(**values):
    with FILE.open("a") as file:
        file.write(json.dumps(values) + "\\n")

class Run:
    def log(self, values, step):
        note(step=step, values=values)

def init(project, id, name, resume, config):
    note(project=project, id=id, name=name, resume=resume, method=config["method"])
    return Run()
"""


@pytest.fixture
def train(tmp_path):
    """`train()`: two steps of the tiny model, logged to the project "mine"; returns the run's folder."""
    drawn_subjects.write(tmp_path / "data", ["dog"], pictures=1)
    flags = [*drawn_subjects.models(tmp_path)[:8], "--out", str(tmp_path / "runs"), "--wandb", "mine"]
    images = ["--images", str(tmp_path / "data" / "dog_0"), "--resolution", "64"]
    settings = ["--set", "run_stages=1", "steps_1=2", "batch_size_1=1", "views=2"]

    def run():
        command.main(["train", "attndreambooth", *images, *settings, *flags])
        return next(path for path in (tmp_path / "runs").iterdir() if (path / "run.json").exists())

    return run


def test_every_step_is_logged(train, tmp_path, monkeypatch):
    (tmp_path / "wandb.py").write_text(STAND_IN)
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    monkeypatch.syspath_prepend(str(tmp_path))
    folder = train()
    monkeypatch.delitem(sys.modules, "wandb")
    begun, *steps = map(json.loads, (tmp_path / "wandb.jsonl").read_text().splitlines())
    name = folder.name
    assert begun == {"project": "mine", "id": name, "name": name, "resume": "allow", "method": "AttnDreamBooth"}
    history = [json.loads(line) for line in (folder / "steps.jsonl").read_text().splitlines()]
    assert [step["step"] for step in steps] == [1, 2]
    for step, entry in zip(steps, history, strict=True):
        terms = {f"terms/{term}": value for term, value in entry["terms"].items()}
        common = {key: entry[key] for key in ("stage", "stage_step", "seconds", "loss")}
        assert step["values"] == common | terms and "terms/attention_means" in terms


def test_without_the_package_one_sentence_comes_first(train, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(SystemExit) as ended:
        train()
    assert not (tmp_path / "runs").exists()
    assert "Weights & Biases is not installed: run `pip install wandb` with this Python" in str(ended.value)
