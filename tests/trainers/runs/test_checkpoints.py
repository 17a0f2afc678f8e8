"""Checkpoints: large ones not too often, and each beside the training without mixing its steps with later ones."""

import errno
import threading
import time
from functools import partial

import pytest
import torch

from personalize.tests.trainers.runs.test_resume import Killed, diverge_at, learned, train
from personalize.trainers.runs import checkpoints, trainer
from personalize.trainers.runs import train as training
from personalize.trainers.runs.checkpoints import SHARE, SMALL, Pace
from personalize.trainers.runs.folder import RunFolder
from personalize.trainers.training.objective import Objective

GIB = 2**30


class Clock:
    seconds = 0.0

    def __call__(self):
        return self.seconds


def written_of(size, speed, step, steps, every):
    """The steps after which one is written, and the seconds that all of it took, `step` each for training."""
    clock, written, spent = Clock(), [], 0.0
    rhythm = Pace(size=size, clock=clock)
    for number in range(1, steps + 1):
        clock.seconds += step
        if number % every == 0 and rhythm.due():
            with rhythm.writing():
                clock.seconds += size / speed
            spent += size / speed
            written.append(number)
    return written, spent, clock.seconds


def test_small_ones_are_written_whenever_they_are_asked_for():
    assert written_of(SMALL, 1e6, 0.1, 200, 50)[0] == [50, 100, 150, 200]


@pytest.mark.parametrize("speed", [0.2e9, 0.5e9, 2e9])
def test_large_ones_take_a_tenth_of_the_time(speed):
    """Of an hour with 10 GB each; only the first, of unknown speed, may take more of the time before it."""
    written, spent, took = written_of(10 * GIB, speed, 0.2, 18_000, 50)
    assert written and written[0] < 1200
    assert spent - 10 * GIB / speed <= SHARE * took
    longest = (1 + 1 / SHARE) * 10 * GIB / speed + 50 * 0.2  # from one to the next, which is only asked for so often
    assert len(written) >= (took - 0.2 * written[0]) // longest


def test_a_killed_run_goes_on_from_the_last_one_written(tmp_path, monkeypatch):
    """Of the checkpoints of every second step the slow disk allows only the first; killed behind the third one due."""
    monkeypatch.setattr(checkpoints, "SMALL", 0)
    train(tmp_path / "whole" / "run")
    clock = Clock()
    monkeypatch.setattr(trainer, "Pace", partial(Pace, clock=clock))

    def on_step(report):
        clock.seconds += 1e6 if report.step == 1 else 0.0
        if report.step == 6:
            raise Killed

    monkeypatch.setattr(training.Trainer, "_break_off", lambda self, stages: None)
    folder, said = tmp_path / "killed" / "run", []
    with pytest.raises(Killed):
        train(folder, callbacks=training.Callbacks(on_step=on_step, on_notice=said.append))
    assert [file.name for file in (folder / "checkpoints").iterdir()] == ["step_000002.safetensors"]
    assert any("at most 10% of the time" in sentence for sentence in said)
    train(folder)
    assert learned(folder) == learned(tmp_path / "whole" / "run")


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
    monkeypatch.setattr(checkpoints, "SMALL", 0)
    monkeypatch.setattr(checkpoints, "SHARE", 1e12)  # otherwise it would always be due
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
    result = train(tmp_path / "run", callbacks=training.Callbacks(on_step=on_step))
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
    assert train(tmp_path / "run").complete
