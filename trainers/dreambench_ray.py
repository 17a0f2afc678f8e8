"""A data set's subjects shared by several workers through Ray: a worker is a process with models of its own, on a card
of its own, here or on another machine. Nothing is shown on a dashboard, and nothing is sent anywhere.
"""

import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from .command_line import Say
from .dreambench_data import Subject
from .dreambench_table import Row
from .dreambench_task import Bench, Worker

QUIET = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}
ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True, kw_only=True)
class Farm:
    """How many workers there are, and where."""

    workers: int
    gpus: float  # of each worker
    address: str  # of a Ray that runs; "" starts one here

    def rows(self, bench: Bench, subjects: Sequence[Subject], say: Say) -> Iterator[Row]:
        """Each subject's row as it comes; a worker that dies fails its subject only."""
        ray = imported()
        self._start(ray)
        try:
            yield from self._rows(ray, bench, [*subjects], say)
        finally:
            ray.shutdown()

    def _start(self, ray) -> None:
        paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        options = {"address": self.address or "local", "log_to_driver": False, "logging_level": logging.ERROR}
        if not self.address:
            options["include_dashboard"] = False
        ray.init(**options, runtime_env={"env_vars": {**QUIET, "PYTHONPATH": paths}})

    def _rows(self, ray, bench: Bench, waiting: list[Subject], say: Say) -> Iterator[Row]:
        from ray.util.queue import Queue

        lines = Queue(actor_options={"num_cpus": 0})
        make = ray.remote(Remote).options(num_cpus=0, num_gpus=self.gpus, max_restarts=-1)
        count = min(self.workers, len(waiting))
        idle = [make.remote(bench, f"cache_{i}", lines, torch.get_num_threads()) for i in range(count)]
        busy = {}
        while waiting or busy:
            while waiting and idle:
                worker, subject = idle.pop(), waiting.pop(0)
                busy[worker.row.remote(subject)] = worker, subject
            ready, _ = ray.wait([*busy], timeout=0.5)
            for sentence in lines.get_nowait_batch(lines.qsize()):
                say(sentence)
            for reference in ready:
                worker, subject = busy.pop(reference)
                idle.append(worker)
                yield _row(ray, reference, subject, say)


class Remote:
    """A Worker in a process of Ray's."""

    def __init__(self, bench: Bench, cache: str, lines, threads: int):
        torch.set_num_threads(threads)  # rounding depends on it
        self.worker = Worker(bench, cache)
        self.lines = lines

    def row(self, subject: Subject) -> Row:
        return self.worker(subject, self.lines.put)


def imported():
    """Ray, without its reports.

    Raises:
        ValueError: it is not installed.
    """
    os.environ |= QUIET
    try:
        import ray
    except ImportError:
        raise ValueError("Several workers need the package ray: pip install ray, or leave out --workers.") from None
    return ray


def _row(ray, reference, subject: Subject, say: Say) -> Row:
    try:
        return ray.get(reference)
    except ray.exceptions.RayError as error:  # it was killed, or its machine is gone
        sentence = f"its worker ended ({type(error).__name__}): start the same command again, it goes on."
        say(f"{subject.name}: failed: {sentence}")
        return Row.failed(subject, sentence)
