"""What the tests share: the pack under the name `personalize`, ComfyUI in this process, and a real server.

The repository root is loaded as a package by its path, as ComfyUI does it, and never stands on sys.path: its folder
`nodes/` would hide ComfyUI's own nodes.py. ComfyUI's folder does stand there, for tests marked `comfy`.
"""

import importlib.util
import logging
import os
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
COMFYUI = Path(os.environ.get("COMFYUI_PATH") or ROOT / ".dev" / "ComfyUI").resolve()
ASIDE = pytest.StashKey()
LIBRARIES = ("diffusers", "transformers", "peft")
# One thread in every process: tiny models are slower on more, many times so beside other work, and rounding depends on
# their number. Read once, when torch is loaded.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def load_pack():
    """`import personalize` from now on means this repository."""
    spec = importlib.util.spec_from_file_location(
        "personalize", ROOT / "__init__.py", submodule_search_locations=[str(ROOT)]
    )
    sys.modules["personalize"] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)


def use_comfyui():
    """Puts ComfyUI on sys.path, on the CPU where there is no accelerator, with its folders below .dev/."""
    sys.path.insert(0, str(COMFYUI))
    from comfy.cli_args import args

    # All are read once, when other modules of ComfyUI are imported, so they are set before any of them is.
    args.cpu = not has_accelerator()
    args.force_fp32 = True  # on an accelerator, too: what is compared with the host should differ by rounding alone
    base = ROOT / ".dev" / "tests" / os.environ.get("PYTEST_XDIST_WORKER", "")
    base.mkdir(parents=True, exist_ok=True)
    args.base_directory = str(base)


def has_accelerator():
    import torch

    return torch.cuda.is_available() or torch.backends.mps.is_available() or torch.xpu.is_available()


class DeprecationsRaise(logging.Handler):
    """The libraries announce some deprecations in their log only; those fail a test, too."""

    def emit(self, record):
        if "deprecated" in record.getMessage():
            raise DeprecationWarning(record.getMessage())


def pytest_configure(config):
    if config.rootpath != ROOT:  # a folder below it, such as tests/server, would hide ComfyUI's module of that name
        raise pytest.UsageError(f"The tests need --rootdir {ROOT}: start them with python dev.py test.")
    # `python -m pytest` puts the working directory first.
    sys.path[:] = [p for p in sys.path if Path(p or ".").resolve() != ROOT]
    load_pack()
    from personalize.tests.support.aside import ModulesAside

    config.stash[ASIDE] = ModulesAside(many=50)
    if (COMFYUI / "main.py").exists():
        use_comfyui()
    import torch

    torch.backends.cudnn.allow_tf32 = False  # comparisons on a card are of float32
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    for name in LIBRARIES:
        logging.getLogger(name).addHandler(DeprecationsRaise())


def slow_files_first(items):
    """Files with slow tests before the others, so that no process is left with a long one at the end."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)  # stable: the order within a file stays


def pytest_collection_modifyitems(items):
    slow_files_first(items)
    reasons = {"gpu": None if has_accelerator() else "no accelerator", "comfy": None, "browser": None}
    if not (COMFYUI / "main.py").exists():
        reasons["comfy"] = f"no ComfyUI in {COMFYUI}"
    from personalize.tests.support import browser

    if browser.chromium() is None:
        reasons["browser"] = "no chromium (Debian: apt-get install chromium)"
    for item in items:
        for marker, reason in reasons.items():
            if reason and item.get_closest_marker(marker):
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    item.config.stash[ASIDE]()


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown():
    """The host remembers which files a folder had, and fails where the folder is gone, as that of a passed test is."""
    if folder_paths := sys.modules.get("folder_paths"):
        folder_paths.filename_list_cache.clear()


@pytest.fixture(scope="session")
def server(tmp_path_factory):
    """One real ComfyUI for the whole session, with this pack, demo/host_node and the tiny checkpoint: a Host."""
    from personalize.tests.support import host

    with host.start(COMFYUI, tmp_path_factory.mktemp("comfyui"), cpu=not has_accelerator()) as running:
        yield running


@pytest.fixture(scope="session")
def object_info(server):
    """/object_info of the server: every node it knows and that node's inputs."""
    return server.client.object_info()


@pytest.fixture(scope="session")
def comfyui():
    """The folder of the ComfyUI in use."""
    return COMFYUI


@pytest.fixture
def model_folders(tmp_path, monkeypatch):
    """{kind: folder} in place of the host's."""
    import folder_paths

    from personalize.nodes.host import folders  # noqa: F401 - adds models/personalize

    made = {kind: tmp_path / "models" / kind for kind in ("loras", "embeddings", "personalize", "checkpoints")}
    for kind, folder in made.items():
        folder.mkdir(parents=True)
        known = folder_paths.folder_names_and_paths[kind][1]
        monkeypatch.setitem(folder_paths.folder_names_and_paths, kind, ([str(folder)], known))
    monkeypatch.setattr(folder_paths, "filename_list_cache", {})
    return made


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where users put their CLIPs."""
    return tmp_path_factory.mktemp("clip_vision")


@pytest.fixture(scope="module")
def shelf(folder):
    """`Backbones` that look there, where the demo world's CLIP lies."""
    from personalize.tests.support import world_clip

    return world_clip.write(folder)
