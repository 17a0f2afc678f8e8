"""Several processes on one training: is it the one that one process makes, and does one that dies end them all?

Real processes, started as users start them, on the CPU with gloo; a launch takes seconds, so each does several things.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from personalize.tests.support import several_processes, waiting

pytestmark = pytest.mark.slow

LAUNCH = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
SCRIPT = Path(several_processes.__file__)
SAME = ("textboost", "uneven", "attndreambooth", "custom diffusion")


def launch(out, *arguments):
    command = [sys.executable, *LAUNCH, SCRIPT, out, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=waiting.LIMIT)


def learned(folder):
    return {k: v for name in ("lora", "clip") for k, v in load_file(folder / f"{name}.safetensors").items()}


def history(folder):
    return [json.loads(line) for line in (folder / "steps.jsonl").read_text().splitlines()]


def assert_same(folder, alone):
    """What was learned, and every loss term, but for rounding; and that anything was learned."""
    ours, theirs = learned(folder), learned(alone)
    assert ours.keys() == theirs.keys()
    worst = max((ours[key] - theirs[key]).abs().max().item() for key in ours)
    print(f"{folder.name}: {worst:.1e}")
    assert worst <= 1e-5
    one, other = history(folder), history(alone)
    assert len(one) == len(other) > 0
    for step, same in zip(one, other, strict=True):
        assert step["terms"] == pytest.approx(same["terms"], rel=1e-4, abs=1e-6)
    about = json.loads((folder / "run.json").read_text())
    assert about["complete"] and about["stops"] and not (folder / "checkpoints").exists()


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The same trainings in this process."""
    out = tmp_path_factory.mktemp("alone")
    for name in SAME:
        several_processes.train(name, out / name)
    return out


def test_two_processes_learn_what_one_does(alone, tmp_path):
    """One training goes on after the kill of a process, which ended both."""
    killed = launch(tmp_path, "textboost", "--kill", "3")
    assert killed.returncode != 0
    about = json.loads((tmp_path / "textboost" / "run.json").read_text())
    assert not about["complete"] and list((tmp_path / "textboost" / "checkpoints").iterdir())

    done = launch(tmp_path, "too small", *SAME)
    assert done.returncode == 0, done.stderr
    assert "too small: The batch of 1 images cannot be shared by 2 processes: start at most 1, or raise" in done.stdout
    for name in SAME:
        assert_same(tmp_path / name, alone / name)
