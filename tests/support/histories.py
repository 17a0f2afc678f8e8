"""Results whose histories are written by hand, for tests of what draws and writes them. No test in here."""

from pathlib import Path

from ...trainers.runs.result import RunResult

STAGES = (("attndreambooth 1", 4), ("attndreambooth 2", 6), ("attndreambooth 3", 10))


def result(history, folder="0123456789abcdef", **changes):
    """A RESULT with that history."""
    settings = {"method": "TextBoost", "concept": {"placeholder_token": "<dog>"}}
    about = {"settings": settings, "dataset": "", "stop_reason": "all steps done", "complete": True}
    about["seconds"] = history[-1]["seconds"] if history else 0.0
    return RunResult(
        folder=Path(folder), lora={}, tokens={}, fixed_outputs=(), history=history, **about | changes
    )  # fmt: skip


def entry(step, **changes):
    """A line of steps.jsonl as runs without monitors have it."""
    own = {"step": step, "steps": 8, "stage": "textboost", "stage_step": step, "seconds": 0.5 * step}
    return own | {"loss": 1 / step, "terms": {"denoising": 1 / step}} | changes


def plain(steps=8):
    return [entry(step) for step in range(1, steps + 1)]


def dvar(step, **more):
    return {"fixed_loss": 2 / (1 + step), "ratio": 1 / (1 + step), "threshold": 0.15, "seconds": 0.01} | more


def clip(step):
    return {"score": 0.5 + step / 100, "best": 0.6, "threshold": 0.62, "seconds": 1.0}


def monitored(steps=8):
    """Two loss terms; DVAR at every step and before the first, with intervals; CLIP at every fourth."""
    lines = []
    for line in plain(steps):
        step = line["step"]
        thirds = {"begin": 3 / step, "middle": 2 / step, "end": 1 / step}
        measures = {"DVAR": dvar(step, **thirds)} | ({} if step % 4 else {"CLIP Early Stopping": clip(step)})
        lines.append(line | {"terms": {"denoising": 1 / step, "knowledge_preservation": step / 100}})
        lines[-1]["measures"] = measures
    lines[0]["start"] = {"DVAR": dvar(0, begin=4.0, middle=3.0, end=2.0), "CLIP Early Stopping": clip(0)}
    return lines


def staged(stages=STAGES):
    """DVAR in each of several stages."""
    lines = []
    for name, steps in stages:
        for step in range(1, steps + 1):
            own = {"stage": name, "stage_step": step, "steps": steps, "measures": {"DVAR": dvar(step)}}
            start = {"start": {"DVAR": dvar(0)}} if step == 1 else {}
            lines.append(entry(len(lines) + 1) | own | start)
    return lines


def stop(step=5, acted=True, **changes):
    own = {"stage": "textboost", "step": step, "stage_step": step, "monitor": "DVAR", "acted": acted}
    return own | {"reason": "the variance over the last 3 steps is 0.140 of all, below 0.15"} | changes
