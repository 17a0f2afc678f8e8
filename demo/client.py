"""Talks to a real ComfyUI: starts and stops its server, queues prompts, fetches images.

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
        # A tiny model gains little from more threads, and loses much where they wait for each other by spinning.
        environment.setdefault("OMP_NUM_THREADS", str(min(8, max(1, (os.cpu_count() or 1) // 2))))
        environment.setdefault("OMP_WAIT_POLICY", "PASSIVE")
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
        """The images a finished prompt wrote: {node id: [file bytes, ...]}."""
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
