"""Checkpoints written beside the training: do they hold their own step, and is nothing read before it is there?"""

import errno
import threading
import time

import pytest
import torch

from personalize.tests.support import small
from personalize.tests.trainers.runs.test_resume import FAST, Killed, diverge_at, learned, train
from personalize.trainers.runs import pace
from personalize.trainers.runs import train as training
from personalize.trainers.runs.folder import RunFolder
from personalize.trainers.training.objective import Objective

PATIENCE = 60  # seconds after which a test fails that would otherwise wait for ever


def wait_for(file):
    end = time.monotonic() + PATIENCE
    while not file.exists() and time.monotonic() < end:
        time.sleep(0.01)
    assert file.exists()


@pytest.fixture
def disk(monkeypatch):
    """A disk that begins to write only when it is let."""
    ready, save_state = threading.Event(), RunFolder.save_state

    def waits(self, stages):
        assert ready.wait(PATIENCE)
        save_state(self, stages)

    monkeypatch.setattr(RunFolder, "save_state", waits)
    return ready


def test_training_goes_on_while_a_checkpoint_is_written(tmp_path, disk, monkeypatch):
    """That of step 2 is written during step 4, when all weights are others, and is that of step 2 all the same."""
    train(tmp_path / "whole" / "run", checkpoint_every=0)
    folder = tmp_path / "killed" / "run"

    def on_step(report):
        if report.step == 3:
            assert not list((folder / "checkpoints").iterdir())
            disk.set()
        if report.step == 4:
            raise Killed

    monkeypatch.setattr(training.Trainer, "_break_off", lambda self, stages: None)
    with pytest.raises(Killed):
        train(folder, checkpoint_every=2, callbacks=training.Callbacks(on_step=on_step))
    (folder / "checkpoints" / "step_000004.safetensors").unlink()
    steps = []
    train(folder, callbacks=training.Callbacks(on_step=lambda report: steps.append(report.step)))
    assert steps == [3, 4, 5, 6, 7]
    assert learned(folder) == learned(tmp_path / "whole" / "run")


def test_no_large_one_is_asked_for_while_another_is_written(tmp_path, disk, monkeypatch):
    monkeypatch.setattr(pace, "SMALL", 0)
    monkeypatch.setattr(pace, "SHARE", 1e12)  # otherwise it would always be due
    written, save_state = [], RunFolder.save_state

    def noted(self, stages):
        written.append(stages[-1].step)
        save_state(self, stages)

    monkeypatch.setattr(RunFolder, "save_state", noted)
    train(
        tmp_path / "run",
        callbacks=training.Callbacks(on_step=lambda report: disk.set() if report.step == 7 else None),
    )
    assert written == [2]


@pytest.mark.parametrize("how", ["no number", "no memory"])
def test_who_goes_back_waits_for_what_is_being_written(tmp_path, disk, monkeypatch, how):
    """The checkpoint of step 4 is on its way when step 6 finds no number, or no memory."""
    again, forward, calls = [], Objective.forward, []

    def limited(self, batch, noise, timesteps):
        calls.append(len(batch))
        if len(calls) == 6:
            raise torch.cuda.OutOfMemoryError("out of memory, on purpose")
        return forward(self, batch, noise, timesteps)

    def on_step(report):
        again.append(report.step)
        if report.step == 3:  # before that of step 4 is asked for
            wait_for(tmp_path / "run" / "checkpoints" / "step_000002.safetensors")
            disk.clear()
        if report.step == 5:
            threading.Timer(0.3, disk.set).start()

    disk.set()
    if how == "no number":
        diverge_at(6, monkeypatch)
    else:
        monkeypatch.setattr(Objective, "forward", limited)
    result = train(tmp_path / "run", models=small.models(), callbacks=training.Callbacks(on_step=on_step))
    if how == "no number":
        assert result.stop_reason.endswith("this is the state after step 4")
    else:
        assert again == [1, 2, 3, 4, 5, 5, 6, 7]


def test_a_full_disk_ends_a_training_at_the_next_checkpoint(tmp_path, monkeypatch):
    """The one that fails is of step 2; what is learned by step 4, when it is noticed, stays."""
    save_state, full = RunFolder.save_state, []

    def once(self, stages):
        if not full:
            full.append(stages[-1].step)
            raise OSError(errno.ENOSPC, "x")
        save_state(self, stages)

    monkeypatch.setattr(RunFolder, "save_state", once)
    with pytest.raises(RuntimeError, match="No space left on device"):
        train(tmp_path / "run")
    partial = RunFolder(tmp_path / "run").result(partial=True)
    assert full == [2] and len(partial.history) == 4 and not partial.complete
    assert RunFolder(tmp_path / "run").last_state()[-1].step == 4


def test_the_last_one_on_its_way_cannot_fail_a_training_that_is_done(tmp_path, monkeypatch):
    """It is only for those who go on, and is deleted then."""
    save_state = RunFolder.save_state

    def last_fails(self, stages):
        if stages[-1].step == 6:
            raise OSError(errno.EIO, "x")
        save_state(self, stages)

    monkeypatch.setattr(RunFolder, "save_state", last_fails)
    assert train(tmp_path / "run", FAST).complete
