"""Large checkpoints: do they take no more than their share of the time, and does a killed run still go on?"""

from functools import partial

import pytest

from personalize.tests.trainers.runs.test_resume import Killed, learned, train
from personalize.trainers.runs import pace, trainer
from personalize.trainers.runs import train as training
from personalize.trainers.runs.pace import SHARE, SMALL, Pace

GIB = 2**30


class Clock:
    seconds = 0.0

    def __call__(self):
        return self.seconds


def checkpoints(size, speed, step, steps, every):
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
    assert checkpoints(SMALL, 1e6, 0.1, 200, 50)[0] == [50, 100, 150, 200]


@pytest.mark.parametrize("speed", [0.2e9, 0.5e9, 2e9])
def test_large_ones_take_a_tenth_of_the_time(speed):
    """Of an hour with 10 GB each; only the first, of unknown speed, may take more of the time before it."""
    written, spent, took = checkpoints(10 * GIB, speed, 0.2, 18_000, 50)
    assert written and written[0] < 1200
    assert spent - 10 * GIB / speed <= SHARE * took
    longest = (1 + 1 / SHARE) * 10 * GIB / speed + 50 * 0.2  # from one to the next, which is only asked for so often
    assert len(written) >= (took - 0.2 * written[0]) // longest


def test_a_killed_run_goes_on_from_the_last_one_written(tmp_path, monkeypatch):
    """Of the checkpoints of every second step the slow disk allows only the first; killed behind the third one due."""
    monkeypatch.setattr(pace, "SMALL", 0)
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
