"""Talks to a real ComfyUI: starts and stops its server, queues prompts, fetches pictures, converts workflows.

Standard library only, because dev.py uses it before anything is installed; tests use it too. It is no general client:
it knows what the demo and the tests need, and it says in one sentence what went wrong.
"""

import contextlib
import json
import os
import socket
import subprocess
import time
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path


class HostError(RuntimeError):
    """The server did not start, refused a prompt, or a node failed; the message is one readable sentence."""


# ---------------------------------------------------------------------------------------------------------------------
# The server


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def link_folder(link, target):
    """Makes `link` lead to the folder `target`; on Windows a junction, which needs no special right."""
    link, target = Path(link), Path(target).resolve()
    if link.exists() and link.resolve() == target:
        return
    with contextlib.suppress(FileNotFoundError):
        link.rmdir() if os.name == "nt" else link.unlink()
    link.parent.mkdir(parents=True, exist_ok=True)
    if os.name == "nt":
        import _winapi

        _winapi.CreateJunction(str(target), str(link))
    else:
        link.symlink_to(target, target_is_directory=True)


def make_base_directory(base, custom_nodes):
    """The folders of `--base-directory`, with links to the custom nodes: {name: folder}."""
    models = [f"models/{kind}" for kind in ("checkpoints", "loras", "embeddings")]
    for folder in (*models, "input", "output", "temp", "user/default"):
        (Path(base) / folder).mkdir(parents=True, exist_ok=True)
    # Otherwise the editor greets a new user with a dialog of templates.
    (Path(base) / "user" / "default" / "comfy.settings.json").write_text('{"Comfy.TutorialCompleted": true}')
    for name, folder in custom_nodes.items():
        link_folder(Path(base) / "custom_nodes" / name, folder)


def has_accelerator(python):
    """Whether the torch of this Python sees an accelerator; without one ComfyUI must be told `--cpu`."""
    script = (
        "import torch; seen = torch.cuda.is_available() or torch.backends.mps.is_available()"
        " or (hasattr(torch, 'xpu') and torch.xpu.is_available()); print(int(bool(seen)))"
    )
    # Not in the current folder, which Python would search first.
    result = subprocess.run([str(python), "-c", script], capture_output=True, text=True, cwd=Path(python).parent)
    return result.returncode == 0 and result.stdout.split()[-1:] == ["1"]


class Server:
    """A ComfyUI process. `with Server(...) as client:` waits until it answers and stops it at the end."""

    def __init__(self, comfyui, python, base, *, port=None, cpu=None, arguments=()):
        self.comfyui, self.python, self.base = Path(comfyui), Path(python), Path(base)
        self.port = port or free_port()
        self.cpu = not has_accelerator(python) if cpu is None else cpu
        self.arguments = list(arguments)
        self.log = self.base / "server.log"
        self.process = None

    @property
    def url(self):
        return f"http://127.0.0.1:{self.port}"

    def start(self, timeout=300):
        """Starts the process and returns a Client once it answers."""
        command = [self.python, "main.py", "--listen", "127.0.0.1", "--port", self.port, "--base-directory", self.base]
        command += ["--disable-auto-launch", "--disable-api-nodes", "--database-url", "sqlite:///:memory:"]
        command += [*(["--cpu"] if self.cpu else []), *self.arguments]
        environment = {**os.environ, "PYTHONUNBUFFERED": "1", "PYTHONIOENCODING": "utf-8"}
        with open(self.log, "wb") as log:
            self.process = subprocess.Popen(
                [str(part) for part in command],
                cwd=self.comfyui,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        client = Client(self.url, alive=self.check_alive)
        try:
            client.wait_until_ready(timeout)
        except BaseException:
            self.stop()
            raise
        return client

    def check_alive(self):
        if self.process.poll() is not None:
            raise HostError(f"ComfyUI ended with status {self.process.returncode}; its log ends:\n{self.log_tail()}")

    def log_tail(self, lines=15):
        return "\n".join(self.log.read_text(encoding="utf-8", errors="replace").splitlines()[-lines:])

    def stop(self):
        if self.process is None or self.process.poll() is not None:
            return
        self.process.terminate()
        try:
            self.process.wait(15)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def __enter__(self):
        return self.start()

    def __exit__(self, *error):
        self.stop()


class Client:
    """The server's HTTP API, as far as the demo and the tests use it."""

    def __init__(self, url, alive=lambda: None):
        self.url = url
        # Raises where the server's process has ended: waiting for it would never end.
        self.alive = alive

    def wait_until_ready(self, timeout):
        deadline = time.monotonic() + timeout
        while True:
            self.alive()
            with contextlib.suppress(OSError):
                return self.get("/system_stats")
            if time.monotonic() > deadline:
                raise HostError(f"ComfyUI did not answer at {self.url} within {timeout} seconds.")
            time.sleep(0.2)

    def get(self, path, **query):
        return json.loads(self.fetch(path, **query))

    def fetch(self, path, **query):
        """The bytes at a path."""
        suffix = "?" + urllib.parse.urlencode(query) if query else ""
        with urllib.request.urlopen(self.url + path + suffix, timeout=60) as response:
            return response.read()

    def post(self, path, data=None):
        """Sends JSON and returns the JSON that comes back, None where the answer is empty."""
        body = json.dumps({} if data is None else data).encode()
        request = urllib.request.Request(self.url + path, data=body, headers={"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=60) as response:
            answer = response.read()
        return json.loads(answer) if answer.strip() else None

    def object_info(self):
        return self.get("/object_info")

    def queue(self, prompt, **extra):
        """Queues a prompt in the API format and returns its id."""
        try:
            return self.post("/prompt", {"prompt": prompt, **extra})["prompt_id"]
        except urllib.error.HTTPError as error:
            raise HostError("ComfyUI refused the prompt: " + refusal(error.read(), prompt)) from None

    def history(self, prompt_id):
        """The history of a prompt that has ended, else None."""
        return self.get(f"/history/{prompt_id}").get(prompt_id)

    def wait(self, prompt_id, timeout=None, on_poll=lambda: None):
        """Waits for a prompt's end and returns its history; raises HostError with the failing node's own message."""
        deadline = None if timeout is None else time.monotonic() + timeout
        while True:
            self.alive()
            on_poll()
            history = self.history(prompt_id)
            if history is not None:
                return succeeded(history)
            if deadline is not None and time.monotonic() > deadline:
                raise HostError(f"The prompt did not end within {timeout} seconds.")
            time.sleep(0.2)

    def run(self, prompt, timeout=None, on_poll=lambda: None):
        """Queues a prompt, waits for it and returns its history."""
        return self.wait(self.queue(prompt), timeout, on_poll)

    def interrupt(self):
        self.post("/interrupt")

    def images(self, history):
        """The pictures a finished prompt wrote: {node id: [file bytes, ...]}."""
        pictures = {}
        for node, output in history["outputs"].items():
            files = [entry for entry in output.get("images", []) if "filename" in entry]
            if files:
                pictures[node] = [self.fetch("/view", **file) for file in files]
        return pictures


def refusal(body, prompt):
    """One sentence out of the answer to a refused prompt."""
    try:
        answer = json.loads(body)
    except ValueError:
        return body.decode(errors="replace")[:500]
    reasons = []
    for node, problem in (answer.get("node_errors") or {}).items():
        name = problem.get("class_type") or prompt.get(node, {}).get("class_type")
        reasons += [f"{name} (node {node}): {e['message']}: {e['details']}" for e in problem["errors"]]
    error = answer.get("error")
    summary = f"{error.get('message')} {error.get('details')}" if isinstance(error, dict) else str(error)
    return "; ".join(reasons) or summary.strip()


def succeeded(history):
    """The history itself, or HostError where a node failed or the prompt was interrupted."""
    status = history.get("status") or {}
    for kind, detail in status.get("messages", []):
        if kind == "execution_error":
            place = f"{detail['node_type']} (node {detail['node_id']})"
            raise HostError(f"{place}: {detail['exception_message'].strip()}")
        if kind == "execution_interrupted":
            raise HostError(f"The prompt was interrupted in {detail['node_type']} (node {detail['node_id']}).")
    if status.get("status_str", "success") != "success":
        raise HostError(f"The prompt failed: {status}")
    return history


# ---------------------------------------------------------------------------------------------------------------------
# From a workflow as the editor saves it to a prompt as the API takes it


# Types that the editor shows as a widget rather than as a socket, so that their value stands in `widgets_values`.
WIDGETS = {"INT", "FLOAT", "STRING", "BOOLEAN", "COMBO", "COLOR", "MARKDOWN", "TEXTAREA", "COMFY_DYNAMICCOMBO_V3"}
UPLOADS = {"image_upload", "video_upload", "animated_image_upload"}
ALWAYS, MUTED, BYPASSED = 0, 2, 4
# Nodes that exist in the editor only.
NOTES = {"Note", "MarkdownNote"}


def to_api(workflow, object_info):
    """The API prompt of a saved workflow: {node id: {"class_type", "inputs", "_meta"}}.

    Does what the editor's own `graphToPrompt` does for the nodes of this pack and the core ones: links through
    reroutes and bypassed nodes, muted nodes, dynamic inputs, seeds with their hidden control. Subgraphs are refused.
    """
    graph = Graph(workflow)
    prompt = {}
    for node in graph.nodes.values():
        kind = node["type"]
        if kind in NOTES or kind in ("Reroute", "PrimitiveNode") or node.get("mode", ALWAYS) in (MUTED, BYPASSED):
            continue
        if kind not in object_info:
            reason = "is a subgraph, which is not supported" if kind in graph.subgraphs else "is not known here"
            raise HostError(f"The node {node.get('title', kind)} (node {node['id']}, {kind}) {reason}.")
        inputs = widget_inputs(node, object_info[kind])
        for slot in node.get("inputs") or []:
            source = graph.source(slot.get("link"), slot["type"])
            if source is not None:
                inputs[slot["name"]] = source
        title = node.get("title") or object_info[kind].get("display_name") or kind
        prompt[str(node["id"])] = {"class_type": kind, "inputs": inputs, "_meta": {"title": title}}
    return prompt


class Graph:
    """The nodes and links of a saved workflow."""

    def __init__(self, workflow):
        self.nodes = {node["id"]: node for node in workflow["nodes"]}
        self.links = {link[0]: link for link in workflow["links"]}
        self.subgraphs = {graph["id"] for graph in (workflow.get("definitions") or {}).get("subgraphs", [])}

    def source(self, link_id, wanted):
        """What a link brings: ["node", slot], a primitive's value, or None where nothing executes at its other end."""
        if link_id is None or link_id not in self.links:
            return None
        _, origin, slot, *_ = self.links[link_id]
        node = self.nodes[origin]
        mode = node.get("mode", ALWAYS)
        if node["type"] == "PrimitiveNode":
            return node["widgets_values"][0]
        if mode == MUTED:
            return None
        if mode == BYPASSED:
            through = bypass(node, slot, wanted)
            return None if through is None else self.source(through.get("link"), wanted)
        if node["type"] == "Reroute":
            return self.source(node["inputs"][0].get("link"), wanted)
        return [str(origin), slot]


def bypass(node, slot, wanted):
    """The input that stands in for an output of a bypassed node: the same slot if it fits, else the first that fits."""
    inputs = node.get("inputs") or []
    if wanted == "*":
        return (inputs[slot] if slot < len(inputs) else inputs[0]) if inputs else None
    if slot < len(inputs) and fits(inputs[slot]["type"], wanted):
        return inputs[slot]
    return next((i for i in inputs if i["type"] == wanted), next((i for i in inputs if fits(i["type"], wanted)), None))


def fits(one, other):
    """Whether two socket types connect; a type may be a comma separated list."""
    one, other = str(one).upper().split(","), str(other).upper().split(",")
    return "*" in one or "*" in other or bool(set(one) & set(other))


def widget_inputs(node, definition):
    """The values of a node's widgets by input name."""
    # A list on its own would be taken for a link.
    return {
        name: {"__value__": value} if isinstance(value, list) else value for name, _, value in widgets(node, definition)
    }


def widgets(node, definition):
    """(input name, position in `widgets_values`, value) of each widget, in the order in which the editor makes them."""
    position, values = 0, node.get("widgets_values") or []
    for section in ("required", "optional"):
        position = yield from read_widgets(definition["input"].get(section) or {}, values, position)


def read_widgets(specs, values, position, prefix=""):
    """One widget after the other, with those that the choice in a dynamic combo brings; returns the next position."""
    for name, spec in specs.items():
        kind, options = spec[0], (spec[1] if len(spec) > 1 else None) or {}
        kind = "COMBO" if isinstance(kind, list) else options.get("widgetType", kind)
        if kind not in WIDGETS or options.get("forceInput"):
            continue
        value = values[position] if position < len(values) else default(kind, spec[0], options)
        yield prefix + name, position, value
        position += 1
        if kind == "COMFY_DYNAMICCOMBO_V3":
            chosen = next((option["inputs"] for option in options["options"] if option["key"] == value), {})
            for section in ("required", "optional"):
                position = yield from read_widgets(chosen.get(section) or {}, values, position, f"{prefix}{name}.")
        position += hidden_slots(prefix + name, kind, options)
    # The editor puts the upload button of a file input after the other widgets; its value stands in the file, too.
    return position + any(UPLOADS & set(spec[1] if len(spec) > 1 else {}) for spec in specs.values())


def hidden_slots(name, kind, options):
    """How many more values follow a widget: the control after generate, and for a combo its filter too."""
    control = options.get("control_after_generate")
    if kind == "INT" and control is None:
        control = name in ("seed", "noise_seed")
    if not control:
        return 0
    return 2 if kind == "COMBO" else 1


def default(kind, choices, options):
    """The value the editor gives a widget that a saved workflow says nothing about."""
    if "default" in options:
        return options["default"]
    if kind == "COMFY_DYNAMICCOMBO_V3":
        return options["options"][0]["key"]
    if kind == "COMBO":
        choices = choices if isinstance(choices, list) else options.get("options", [])
        return choices[0] if choices else None
    return {"INT": 0, "FLOAT": 0.0, "BOOLEAN": False}.get(kind, "")


def override_workflow(workflow, object_info, overrides):
    """A copy of a saved workflow with the same changes as `override` makes, where they are values of widgets."""
    workflow = json.loads(json.dumps(workflow))
    for node in workflow["nodes"]:
        for name, position, _ in list(widgets(node, object_info.get(node["type"], {"input": {}}))):
            for key in (node["type"], node.get("title")):
                if name in overrides.get(key, {}):
                    node["widgets_values"][position] = overrides[key][name]
    return workflow


def override(prompt, overrides):
    """A copy of the prompt with some inputs changed: {class type or node title: {input: value}}.

    A name that fits no node, or an input that the node does not have, is an error: an override that changes nothing
    would go unnoticed. Keys that begin with "_" are comments.
    """
    prompt = json.loads(json.dumps(prompt))
    for name, changes in overrides.items():
        if name.startswith("_"):
            continue
        nodes = [n for n in prompt.values() if name in (n["class_type"], n.get("_meta", {}).get("title"))]
        if not nodes:
            raise HostError(f"An override names {name}, which is no node of the workflow.")
        for node in nodes:
            for key, value in changes.items():
                if key not in node["inputs"]:
                    raise HostError(f"An override names {name}.{key}, which that node does not have.")
                node["inputs"][key] = value
    return prompt
