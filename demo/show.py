"""`python dev.py demo`: a real ComfyUI learns a subject from one image and draws it in new scenes.

Runs workflows/before_and_after.json, a file that users open, with the values of overrides.json. Standard library only:
what needs more (drawing the reference, building the checkpoint, scoring) runs in the virtual environment's Python.
"""

import contextlib
import json
import shutil
import subprocess
import time
from pathlib import Path

from . import client
from .workflow import override, override_workflow, to_api

CHECKPOINT = "personalize-tiny.safetensors"
REFERENCE = "reference.png"
INSTANCE = 2_000_034  # as a dog: blue, dotted, with yellow legs, ears and tail; yellow is what captions never name
UNTRAINED, TRAINED = "Untrained", "Trained"  # titles of the two Save Image nodes
PROMPT = "{}: prompt"  # of the nodes that encode their prompts
MEANINGS = {
    "identity_floor": "the untrained model, prompted with the class word",
    "identity_oracle": "the untrained model, prompted with every detail that words can name",
    "identity": "the trained model",
    "identity_ceiling": "other real images of the same individual",
    "text_floor": "how well the untrained model follows the prompts",
    "text": "how well the trained model follows the prompts",
}


def run(root, base, out, comfyui, python, options):
    """Everything that `dev.py demo` does, in the base directory `base` and into the folder `out`; the exit status."""
    start = time.monotonic()
    try:
        overrides = with_options(read_json(root / "demo" / "overrides.json"), options)
        words = prepare(root, base, python, class_word(overrides))
        cpu = not client.has_accelerator(python)
        server = client.Server(comfyui, python, base, port=options.port, cpu=cpu)
        with step("starting ComfyUI" + (" on the CPU" if cpu else "")):
            host = server.start()
        try:
            print(f"\n  ComfyUI runs at {server.url}: look on in a browser (Workflows: textboost demo).\n", flush=True)
            job = learn_and_draw(root, base, host, overrides, words)
            with step("scoring"):
                report(root, python, "score", write_job(base, job), out)
            tell(out, time.monotonic() - start)
            if options.keep:
                print(f"\n  The server goes on at {server.url}; Ctrl-C ends it.", flush=True)
                server.process.wait()
        finally:
            server.stop()
    except client.HostError as error:
        print(f"\ndev.py: {error}\nThe server's log is {base / 'server.log'}.", flush=True)
        return 1
    return 0


def prepare(root, base, python, subject):
    """The base directory with the checkpoint and the reference image; returns the latter's description in words."""
    client.make_base_directory(base, {"personalize": root, "personalize_demo_host": root / "demo" / "host_node"})
    checkpoint = base / "models" / "checkpoints" / CHECKPOINT
    sources = [*(root / "demo" / "weights").glob("*.safetensors"), root / "demo" / "build.py"]
    if not checkpoint.exists() or any(s.stat().st_mtime > checkpoint.stat().st_mtime for s in sources):
        with step("building the tiny checkpoint"):
            child([python, root / "demo" / "build.py", checkpoint], root)
    with step("making the reference image"):
        picture = base / "input" / REFERENCE
        return report(root, python, "reference", picture, "--instance", INSTANCE, "--class-word", subject)


def learn_and_draw(root, base, host, overrides, words):
    """Runs the workflow once per prompt, the first time with the training; returns what the report needs."""
    workflow = read_json(root / "workflows" / "before_and_after.json")
    tell_overrides(overrides)
    runs, object_info = one_by_one(overrides), host.object_info()
    api = to_api(workflow, object_info)
    offer(override_workflow(workflow, object_info, runs[0]), base)
    placeholder = find(api, "PersonalizeLoadReferences")["placeholder_token"]
    prompts = [changes[PROMPT.format(TRAINED)]["text"].replace(placeholder, "{}") for changes in runs]
    progress = Progress(base / "output" / "personalize" / "runs")
    pictures = {"untrained": [], "trained": [], "words": []}

    print(f"  training, then generating: {prompts[0]}", flush=True)
    for number, changes in enumerate(runs):
        prompt = override(api, changes)
        with step(f"generating: {prompts[number]}") if number else contextlib.nullcontext():
            history = host.run(prompt, on_poll=progress.show)
        if number == 0 and progress.last is None:
            print("    (a training with these inputs was finished before: used again)", flush=True)
        for name, title in (("untrained", UNTRAINED), ("trained", TRAINED)):
            pictures[name].append(host.images(history)[node_titled(prompt, title)])
    # The untrained model once more, told in words all that words can tell: what it takes no training to reach.
    for number, changes in enumerate(runs):
        prompt = override(api, {**changes, PROMPT.format(UNTRAINED): {"text": prompts[number].replace("{}", words)}})
        # Nodes run for the sake of an output, so without the other output there is no training in this prompt.
        del prompt[node_titled(prompt, TRAINED)]
        with step(f"generating, untrained: {prompts[number].replace('{}', words)}"):
            history = host.run(prompt)
        pictures["words"].append(host.images(history)[node_titled(prompt, UNTRAINED)])
    return {
        **{"instance": INSTANCE, "class_word": class_word(overrides), "prompts": prompts, "pictures": pictures},
        "placeholder": placeholder,
        "device": host.get("/system_stats")["devices"][0]["name"],
        **progress.result(runs[0]["PersonalizeTrain"]["seed"], runs[0]["PersonalizeTextBoost"]["preset.steps"]),
    }


def offer(workflow, base):
    """Puts the workflow with its overrides into the editor's list of workflows."""
    folder = base / "user" / "default" / "workflows"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "textboost demo.json").write_text(json.dumps(workflow), encoding="utf-8")


def find(prompt, class_type):
    """The inputs of the one node of a class."""
    return next(node["inputs"] for node in prompt.values() if node["class_type"] == class_type)


def node_titled(prompt, title):
    return next(number for number, node in prompt.items() if node["_meta"]["title"] == title)


# ---------------------------------------------------------------------------------------------------------------------
# Overrides


def with_options(overrides, options):
    """The overrides with the values given on the command line."""
    if options.steps is not None:
        overrides["PersonalizeTextBoost"]["preset.steps"] = options.steps
    if options.seed is not None:
        overrides["PersonalizeTrain"]["seed"] = options.seed
    return overrides


def class_word(overrides):
    return overrides["PersonalizeLoadReferences"]["class_word"]


def one_by_one(overrides):
    """One set of overrides per entry of the lists in them; lists are equally long."""
    lists = [value for changes in inputs(overrides).values() for value in changes.values() if isinstance(value, list)]
    number = len(lists[0]) if lists else 1
    return [
        {
            name: {key: value[i] if isinstance(value, list) else value for key, value in changes.items()}
            for name, changes in inputs(overrides).items()
        }
        for i in range(number)
    ]


def inputs(overrides):
    """The overrides without their comments."""
    return {name: changes for name, changes in overrides.items() if not name.startswith("_")}


def tell_overrides(overrides):
    print("  workflows/before_and_after.json, with the values of demo/overrides.json:")
    for name, changes in inputs(overrides).items():
        for key, value in changes.items():
            for item in value if isinstance(value, list) else [value]:
                print(f"    {name}.{key} = {item!r}")
    print(flush=True)


# ---------------------------------------------------------------------------------------------------------------------
# Progress and results


class Progress:
    """Follows a training through the steps.jsonl that it writes; `show` is called again and again."""

    def __init__(self, runs):
        self.runs, self.started, self.shown, self.last = Path(runs), time.time() - 1, 0, None

    def show(self):
        """Prints a line for every tenth of the training."""
        for line in self.new_lines():
            self.last = json.loads(line)
            done, steps = self.last["step"], self.last.get("steps") or 0
            if done == 1 or done == steps or done % max(1, steps // 10) == 0:
                print(
                    f"    step {done}/{steps}  loss {self.last['loss']:.4f}  {self.last['seconds']:.0f} s", flush=True
                )

    def new_lines(self):
        """The whole lines that came since the last call."""
        file = self.file()
        if file is None:
            return []
        lines = file.read_text(encoding="utf-8").split("\n")[:-1]
        new, self.shown = lines[self.shown :], len(lines)
        return new

    def file(self):
        """The log that grew since the start, or None before the training has begun."""
        logs = [(log.stat().st_mtime, log) for log in self.runs.glob("*/steps.jsonl")]
        changed, newest = max(logs, default=(0, None))
        return newest if changed >= self.started else None

    def result(self, seed, steps):
        """Steps and seconds of the training that was followed, or of the finished one that was used again."""
        if self.last is not None:
            return {"steps": self.last["step"], "train_seconds": self.last["seconds"]}
        for file in sorted(self.runs.glob("*/run.json"), key=lambda file: file.stat().st_mtime, reverse=True):
            stored = read_json(file)
            settings = stored["settings"]
            if stored["complete"] and settings["seed"] == seed and settings["recipe"]["steps"] == steps:
                return {"steps": steps, "train_seconds": stored["seconds"]}
        raise client.HostError(f"No training was followed, and none with these inputs stands in {self.runs}.")


def write_job(base, job):
    """The images as files and the job beside them, for report.py; returns the job's path."""
    folder = base / "report"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    shutil.copy(base / "input" / REFERENCE, folder / REFERENCE)
    files = {}
    for name, rows in job["pictures"].items():
        files[name] = [[f"{name}_{i}_{j}.png" for j in range(len(row))] for i, row in enumerate(rows)]
        for row, names in zip(rows, files[name]):
            for data, file in zip(row, names):
                (folder / file).write_bytes(data)
    path = folder / "job.json"
    path.write_text(json.dumps({**job, "pictures": files, "reference": REFERENCE}, indent=2), encoding="utf-8")
    return path


def tell(out, seconds):
    report = read_json(out / "report.json")
    print(f"\n  Identity (1 = the same image) and text alignment, in {out / 'report.json'}:")
    for name, meaning in MEANINGS.items():
        print(f"    {name:<17} {report[name]:>7}   {meaning}")
    print(f"\n  Images: {out / 'grid.png'}\n  Done in {seconds:.0f} s.", flush=True)


# ---------------------------------------------------------------------------------------------------------------------
# Small things


def report(root, python, *arguments):
    """Runs demo/report.py in the environment's Python and returns the last line that it prints."""
    return child([python, "-m", "demo.report", *arguments], root)


def child(command, root):
    result = subprocess.run([str(part) for part in command], cwd=root, capture_output=True, text=True)
    lines = (result.stdout if result.returncode == 0 else result.stderr).strip().splitlines() or [""]
    if result.returncode:
        script = command[2] if command[1] == "-m" else command[1]
        raise client.HostError(f"{script} failed: {lines[-1]}")
    return lines[-1]


def read_json(path):
    return json.loads(path.read_text(encoding="utf-8"))


@contextlib.contextmanager
def step(text):
    start = time.monotonic()
    print(f"  {text} ...", end=" ", flush=True)
    yield
    print(f"{time.monotonic() - start:.0f} s", flush=True)
