"""A run's history: checked entries, curves, sentences. history_plot.py draws it, history_export.py writes it."""

import itertools

from ..runs.result import RunResult

NO_HISTORY = "This result has no history to plot: connect one of Train or Load Personalized."
DAMAGED = "The history of this result cannot be read (entry {}): connect one of Train or Load Personalized."

Points = list[tuple[int, float]]


def entries(result: RunResult) -> list[dict]:
    """Return the history, an entry per step, with all keys.

    Raises:
        ValueError: there is none, or it cannot be read.
    """
    if not result.history:
        raise ValueError(NO_HISTORY)
    found: list[dict] = []
    for number, entry in enumerate(result.history, 1):
        try:
            found.append(_entry(entry, found[-1] if found else {}))
        except (LookupError, TypeError, ValueError, AttributeError, OverflowError):
            raise ValueError(DAMAGED.format(number)) from None
    return found


def _entry(given: dict, last: dict) -> dict:
    step = given["step"]
    if type(step) is not int or step <= last.get("step", 0):
        raise ValueError
    own = {"step": step, "stage": str(given["stage"]), "stage_step": int(given["stage_step"])}
    numbers = {name: _number(given[name]) for name in ("seconds", "loss")}
    measured = {name: {k: _numbers(v) for k, v in given.get(name, {}).items()} for name in ("measures", "start")}
    return own | numbers | {"terms": _numbers(given.get("terms", {}))} | measured


def _number(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError
    return float(value)


def _numbers(values: dict) -> dict[str, float]:
    """Return the numbers among measurements; lists, such as DVAR's parts of a batch, are not curves."""
    return {str(name): _number(value) for name, value in values.items() if not isinstance(value, list)}


def stages(history: list[dict]) -> list[list[dict]]:
    """Group entries by stage."""
    return [list(group) for _, group in itertools.groupby(history, key=lambda entry: entry["stage"])]


# -- curves


def losses(history: list[dict]) -> list[Points]:
    """Return, by stage, (step over all stages, loss)."""
    return [[(entry["step"], entry["loss"]) for entry in stage] for stage in stages(history)]


def terms(history: list[dict], name: str) -> list[Points]:
    """Return, by stage, (step over all stages, unweighted term of the loss)."""
    return [[(e["step"], e["terms"][name]) for e in stage if name in e["terms"]] for stage in stages(history)]


def measures(history: list[dict], monitor: str, name: str) -> list[Points]:
    """Return a monitor's measurements by stage; one before a stage's first step counts as one step earlier."""
    return [_measured(stage, monitor, name) for stage in stages(history)]


def _measured(stage: list[dict], monitor: str, name: str) -> Points:
    found = [(stage[0]["step"] - 1, stage[0]["start"])] + [(entry["step"], entry["measures"]) for entry in stage]
    return [(step, each[monitor][name]) for step, each in found if name in each.get(monitor, {})]


def running_mean(points: Points, most: int) -> Points:
    """Return the mean of each value and those before it, `most` at most."""
    values = [value for _, value in points]
    windows = (values[max(0, i + 1 - most) : i + 1] for i in range(len(values)))
    return [(step, sum(window) / len(window)) for (step, _), window in zip(points, windows, strict=True)]


def monitors(history: list[dict], name: str = "seconds") -> list[str]:
    """Return the monitors that measured something of that name, in the order of the log."""
    measured = itertools.chain.from_iterable((entry["start"], entry["measures"]) for entry in history)
    return [*dict.fromkeys(monitor for each in measured for monitor, found in each.items() if name in found)]


# -- sentences


def summary(result: RunResult, mean_of: int = 25) -> str:
    """Summarize a run in lines: steps, time, loss, cost and last values of each monitor, the reason of its end.

    Raises:
        ValueError: as `entries`.
    """
    history = entries(result)
    parts = stages(history)
    lines = [f"{title(result)}, run {result.folder.name}", _steps(history, result.seconds)]
    lines += [_steps(stage, _seconds(stage, before), f"  {stage[0]['stage']}: ") for stage, before in _pairs(parts)]
    lines += [f"Loss: {history[0]['loss']:.4g} at the first step, {_last_mean(parts[-1], mean_of)}."]
    lines += [_cost(history, monitor, result.seconds) for monitor in monitors(history)]
    return "\n".join([*lines, *map(stop, stops(result)), ending(result)])


def title(result: RunResult) -> str:
    """Return placeholder token and method."""
    method = str(result.settings.get("method", "")).removesuffix("2026")
    return ", ".join(filter(None, (str(result.placeholder_token), method)))


def length(history: list[dict], seconds: float) -> str:
    """Return a text such as `250 steps in 12 min 4 s`."""
    return f"{len(history)} step{'s' * (len(history) != 1)} in {duration(seconds)}"


def duration(seconds: float) -> str:
    """Return a text such as `12 min 4 s`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{seconds:.3g} s"


def _steps(history: list[dict], seconds: float, before: str = "") -> str:
    return f"{before}{length(history, seconds)}, {seconds / len(history):.3g} s each."


def _pairs(parts: list[list[dict]]) -> list[tuple[list[dict], list[dict]]]:
    """Pair stages with the one before them, if there are several."""
    return [*zip(parts, [[], *parts])] if len(parts) > 1 else []


def _seconds(stage: list[dict], before: list[dict]) -> float:
    return stage[-1]["seconds"] - (before[-1]["seconds"] if before else 0.0)


def _last_mean(stage: list[dict], most: int) -> str:
    ((_, mean),) = running_mean(losses(stage)[0], most)[-1:]
    count = min(most, len(stage))
    return f"{mean:.4g} over the last {count} of its stage" if count > 1 else f"{mean:.4g} at the last"


def _cost(history: list[dict], monitor: str, seconds: float) -> str:
    """Return a monitor's number of evaluations, their time and the last values."""
    spent = [value for points in measures(history, monitor, "seconds") for _, value in points]
    share = f", {sum(spent) / seconds:.1%} of the training" if seconds else ""
    last = next(entry["measures"][monitor] for entry in [*history[::-1], history[0]] if monitor in entry["measures"])
    found = ", ".join(f"{name} {value:.4g}" for name, value in last.items() if name != "seconds")
    return f"{monitor}: {len(spent)} evaluations, {duration(sum(spent))}{share}; last {found}."


def stops(result: RunResult) -> list[dict]:
    """Return the stops of monitors and the picked state, in the order of steps."""
    steps = {entry["step"] for entry in entries(result)}
    known = [each for each in result.stops if isinstance(each, dict) and type(each.get("step")) is int]
    known += [{"step": result.picked, "acted": True, "picked": True}] if result.picked else []
    known = [each for each in known if each["step"] in steps]
    return sorted(known, key=lambda each: each["step"])


def stop(each: dict) -> str:
    """Return one of `stops` as a sentence."""
    if each.get("picked"):
        return f"Step {each['step']}: its state was picked, by score."
    monitor, why = str(each.get("monitor", "")), str(each.get("reason", ""))
    why = why.removeprefix(f"{monitor}: ")
    did = "stopped" if each.get("acted") else "would have stopped"
    noted = "" if each.get("acted") else " (only recorded)"
    what = each.get("stage") or "the training"
    return f"Step {each['step']}: {monitor} {did} {what}{noted}: {why}."


def ending(result: RunResult) -> str:
    """Return the reason of the end as a sentence."""
    return f"It ended: {str(result.stop_reason).removesuffix('.')}."
