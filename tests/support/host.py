"""A real ComfyUI for tests: the process, its base directory and the client that talks to it. No test in here."""

import contextlib
import sys
from dataclasses import dataclass
from pathlib import Path

from ...demo import client as api
from . import waiting

ROOT = Path(__file__).resolve().parents[2]
CHECKPOINT = "personalize-tiny.safetensors"
# A few: to encode all of the pack's takes longer than a training of seconds.
CAPTIONS = {"preset.captions": "captions.txt"}
# On top of the demo's overrides: a training of seconds, which learns nothing but goes through everything.
QUICK = {
    "PersonalizeLoadReferences": {"resolution": 64},
    "PersonalizeTextBoost": {"preset.steps": 3, "preset.views": 8, **CAPTIONS},
    "PersonalizeTrain": {"preview_every": 0, "preview_steps": 2},
    "EmptyLatentImage": {"batch_size": 1},
    "KSampler": {"steps": 3},
}


@dataclass(frozen=True)
class Host:
    """A running server: what `server` is in a test."""

    client: api.Client
    base: Path
    checkpoint: str = CHECKPOINT

    @property
    def url(self):
        return self.client.url

    @property
    def log(self):
        return (self.base / "server.log").read_text(encoding="utf-8", errors="replace")

    def run(self, prompt, timeout=waiting.LIMIT):
        """Queues an API prompt and returns its history; a failing node raises HostError with its message."""
        return self.client.run(prompt, timeout)

    def images(self, history):
        """The images of a history as PIL images: {node id: [image, ...]}."""
        from io import BytesIO

        from PIL import Image

        files = self.client.images(history)
        return {node: [Image.open(BytesIO(data)) for data in pictures] for node, pictures in files.items()}


def demo_overrides():
    """The demo's overrides for its first prompt."""
    from ...demo import show

    return show.one_by_one(show.read_json(ROOT / "demo" / "overrides.json"))[0]


def prepare(base, pack=ROOT):
    """A base directory with this pack, the tiny checkpoint, and what teaches the host its and random_sd.py's layout."""
    from ...demo import build
    from . import small

    teachers = {
        "personalize_demo_host": ROOT / "demo" / "host_node",
        "personalize_random": ROOT / "tests" / "host_node",
    }
    api.make_base_directory(base, {"personalize": pack, **teachers})
    build.build_checkpoint(base / "models" / "checkpoints" / CHECKPOINT)
    (base / "input" / "captions.txt").write_text("\n".join(small.CAPTIONS))


@contextlib.contextmanager
def start(comfyui, base, *, cpu, arguments=(), pack=ROOT):
    """Starts ComfyUI on a free port with this pack, demo/host_node and the demo's image, and stops it at the end."""
    from ...demo import report, show

    prepare(base, pack)
    report.reference(base / "input" / show.REFERENCE, show.INSTANCE, show.class_word(demo_overrides()))
    server = api.Server(comfyui, sys.executable, base, cpu=cpu, arguments=arguments)
    with server as client:
        yield Host(client, base)
