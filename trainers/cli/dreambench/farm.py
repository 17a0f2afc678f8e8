"""Workers for a data set's subjects, through Ray: processes with their own models and card, here or on other machines.

There is no dashboard, and nothing is reported to anyone.
"""

import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from ..options import Say
from .dataset import Subject
from .subject import Bench, Worker
from .table import Row

QUIET = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}
ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True, kw_only=True)
class Farm:
    """Number and place of the workers."""

    workers: int
    gpus: float  # of each worker
    address: str  # of a running Ray; "" starts one here

    def rows(self, bench: Bench, subjects: Sequence[Subject], say: Say) -> Iterator[Row]:
        """Yield each subject's row when it is done; a worker that dies fails only its subject."""
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
        if self.workers * self.gpus > (cards := ray.cluster_resources().get("GPU", 0)):  # they would wait forever
            raise ValueError(
                f"{self.workers} workers with --gpus {self.gpus:g} need more cards than the {cards:g} that Ray has: "
                "start fewer, or give each a part of a card."
            )

    def _rows(self, ray, bench: Bench, waiting: list[Subject], say: Say) -> Iterator[Row]:
        from ray.util.queue import Queue

        lines = Queue(actor_options={"num_cpus": 0})
        make = ray.remote(Remote).options(num_cpus=0, num_gpus=self.gpus)

        def worker(number: int):
            return number, make.remote(bench, f"cache_{number}", lines, torch.get_num_threads())

        idle = [worker(number) for number in range(min(self.workers, len(waiting)))]
        busy: dict = {}
        while waiting or busy:
            while waiting and idle:
                (number, free), subject = idle.pop(), waiting.pop(0)
                busy[free.row.remote(subject)] = number, free, subject
            ready, _ = ray.wait([*busy], timeout=0.5)
            for sentence in lines.get_nowait_batch(lines.qsize()):
                say(sentence)
            for reference in ready:
                number, free, subject = busy.pop(reference)
                try:
                    row = ray.get(reference)
                except ray.exceptions.RayError as error:  # it was killed, or its machine is gone
                    row = Row.failed(
                        subject, f"its worker ended ({type(error).__name__}): start the command again to resume."
                    )
                    say(f"{subject.name}: failed: {row.why}")
                    free = worker(number)[1]
                idle.append((number, free))
                yield row


class Remote:
    """A `Worker` in a process of Ray."""

    def __init__(self, bench: Bench, cache: str, lines, threads: int):
        torch.set_num_threads(threads)  # rounding depends on it
        self.worker = Worker(bench, cache)
        self.lines = lines

    def row(self, subject: Subject) -> Row:
        return self.worker(subject, self.lines.put)


def imported():
    """Import Ray, without its usage reports.

    Raises:
        ValueError: it is not installed.
    """
    os.environ |= QUIET
    try:
        import ray
    except ImportError:
        raise ValueError("Several workers need the package ray: pip install ray, or leave out --workers.") from None
    return ray
