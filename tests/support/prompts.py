"""API prompts for a real server: a smallest training, changes to it, how it ended, what a user reads. No test."""

import json
import re
import tempfile
import urllib.error
from dataclasses import dataclass
from pathlib import Path

from . import waiting

ROOT = Path(__file__).resolve().parents[2]
DROP = object()  # as a changed value: the input is left out
PICTURE = "reference.png"  # tests/support/host.py puts it there
# What Python says and a user should never read.
INTERNALS = re.compile(
    r"Traceback|NoneType|has no attribute|\bmissing \d+ required|positional argument|keyword argument|expected str"
    r"|[a-z]+ object\b|object is not|not subscript|unhashable|\bcodec\b|out of (?:range|bounds)|unsupported operand"
    r"|\bErrno\b|invalid literal|could not convert|\b\w+(?:Error|Exception)\b|\btensor\b|\bsize mismatch|<class|\bint\("
    r"|\bzip\(\)|too many values|not enough values|must be (?:real|a string|str|int)|\bdtype\b|\bdict\b|surrogate"
)
OURS = re.compile(r"custom_nodes/personalize/|/" + re.escape(ROOT.name) + r"/(?:nodes|trainers)/")


@dataclass(frozen=True)
class Outcome:
    """How a prompt ended: "success", "refused" before it ran, "failed" while it ran, or "host" where the host broke."""

    kind: str
    message: str = ""
    node: str = ""  # the class of the node that spoke
    ours: bool = False  # whether a file of the pack did


def smallest(object_info, checkpoint: str) -> dict:
    """One step on one view at 64 pixels, saved: a training of less than a second, which goes through everything."""
    small = {"preset": "benchmark", "preset.steps": 1, "preset.views": 1, "preset.batch_size": 1}
    links = {"model": ["checkpoint", 0], "clip": ["checkpoint", 1], "vae": ["checkpoint", 2]}
    made = {"concept": ["references", 0], "recipe": ["recipe", 0]}
    chosen = {
        "references": ("LoadReferences", {"images.image0": ["image", 0], "resolution": 64, "crop": "center"}),
        "recipe": ("TextBoost", {**small, "preset.knowledge_weight": 0.0}),
        "train": ("Train", {**links, **made, "preview_every": 0, "precision": "auto"}),
        "save": ("Save", {"result": ["train", 2], "name": "smallest", "overwrite": True}),
    }
    prompt = {
        "checkpoint": {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": checkpoint}},
        "image": {"class_type": "LoadImage", "inputs": {"image": PICTURE}},
    }
    for name, (kind, inputs) in chosen.items():
        shown = defaults(object_info[f"Personalize{kind}"]["input"])
        prompt[name] = {"class_type": f"Personalize{kind}", "inputs": {**shown, **inputs}}
    return prompt


def defaults(inputs: dict) -> dict:
    """A node's inputs with the values that its widgets show."""
    fields = {**inputs.get("required", {}), **inputs.get("optional", {})}
    return {name: spec[1]["default"] for name, spec in fields.items() if "default" in (spec[-1] or {})}


def relinked(prompt: dict, links: dict) -> dict:
    """A copy whose inputs from the outputs in `links`, {(node, slot): [node, slot]}, come from others."""
    copy = json.loads(json.dumps(prompt))
    for node in copy.values():
        for name, value in node["inputs"].items():
            if isinstance(value, list):
                node["inputs"][name] = links.get(tuple(value), value)
    return copy


def changed(prompt: dict, changes: dict) -> dict:
    """A copy with other inputs, {"node.input": value}, and other nodes, {"node": (class, inputs)} or DROP."""
    copy = json.loads(json.dumps(prompt))
    for key, value in changes.items():
        node, _, name = key.partition(".")
        if not name and value is DROP:
            del copy[node]
        elif not name:
            copy[node] = {"class_type": value[0], "inputs": dict(value[1])}
        elif value is DROP:
            copy[node]["inputs"].pop(name)
        else:
            copy[node]["inputs"][name] = value
    return copy


def queue(client, prompt: dict, **extra) -> str | Outcome:
    """The prompt's id, or how it was turned away; `extra` is sent beside it."""
    try:
        return client.post("/prompt", {"prompt": prompt, **extra})["prompt_id"]
    except urllib.error.HTTPError as error:
        body = error.read()
        return _refused(json.loads(body)) if error.code == 400 else Outcome("host", f"HTTP {error.code}")


def _refused(answer: dict) -> Outcome:
    for problem in (answer.get("node_errors") or {}).values():
        for error in problem["errors"]:
            ours = error["type"] == "custom_validation_failed"
            details = error["details"].partition(" - ")[2] if ours else f"{error['message']}: {error['details']}"
            ours = ours or _in_pack(error.get("extra_info", {}).get("traceback"))
            return Outcome("refused", details, problem.get("class_type", ""), ours)
    error = answer["error"]
    return Outcome("refused", f"{error['message']}: {error['details']}")


def ended(client, prompt_id: str) -> Outcome:
    """Waits for a queued prompt."""
    history = waiting.until(lambda: client.history(prompt_id), client.alive)
    for kind, detail in history["status"]["messages"]:
        if kind == "execution_error":
            # Calling a node with the wrong arguments fails in the host's files; a cycle is the host's own finding.
            at_ours = detail["node_type"].startswith("Personalize") and "Cycle" not in detail["exception_type"]
            ours = _in_pack(detail["traceback"]) or at_ours
            return Outcome("failed", detail["exception_message"].strip(), detail["node_type"], ours)
    assert history["status"]["status_str"] == "success", history["status"]
    return Outcome("success")


def run(client, prompt: dict, **extra) -> Outcome:
    queued = queue(client, prompt, **extra)
    return queued if isinstance(queued, Outcome) else ended(client, queued)


def _in_pack(traceback) -> bool:
    return any(OURS.search(line) for line in traceback or ())


def faults(message: str) -> list[str]:
    """What keeps a message of ours from being one clear sentence; nothing, for a good one."""
    unquoted = re.sub(r"'[^']*'|\"[^\"]*\"", "'...'", message)
    found = ["more than one line"] if "\n" in message else []
    found += [f"words of Python: {word}" for word in INTERNALS.findall(unquoted)]
    found += ["more than one sentence"] if re.search(r"[.!?] +[A-Z]", unquoted) else []
    found += [] if re.match(r"['\"A-Z\d]", message) and message.endswith(".") else ["no whole sentence"]
    found += [f"too long: {len(message)}"] if len(message) > 400 else []
    places = (ROOT, Path.home(), tempfile.gettempdir(), "/usr", "site-packages")
    return found + [f"a path of the machine: {place}" for place in map(str, places) if place in message]
