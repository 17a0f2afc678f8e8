"""Sets up everything this repository needs and drives it: `python dev.py --help` lists the commands.

Standard library only, no shell; written for Linux, macOS and Windows. Everything it makes lies in `.dev/`: the real
ComfyUI, virtual environments (tools/environments.py), the demo's working directory and the log. This is a tool for
developers of the pack; users of ComfyUI never run it.
"""

import argparse
import os
import signal
import sys
from pathlib import Path

from tools import environments, gpu_kit
from tools.children import ROOT, STATE, ask, stop, watch

# What each command needs of a Python that it may not install into.
NEEDED = {
    "torch": "torch",
    "torchvision": "torchvision",
    "torchaudio": "torchaudio",
    "aiohttp": "aiohttp",
    "diffusers": "diffusers",
    "peft": "peft",
    "accelerate": "accelerate",
    "open_clip": "open_clip_torch",
    "einops": "einops",
    "matplotlib": "matplotlib",
    "timm": "timm",
}
TESTS = {"pytest": "pytest", "xdist": "pytest-xdist"}
NEEDED_FOR = {"test": TESTS, "check": {**TESTS, "ruff": "ruff", "mypy": "mypy"}}
WORKERS = 3  # processes that share all tests: many wait for others; more need more memory
FAST = "not slow and not gpu and not browser"


def main():
    if sys.version_info < (3, 10):  # noqa: UP036 - pyproject.toml says the same, but nothing has read it yet
        stop(f"Python 3.10 or newer is needed; this one is {sys.version.split()[0]}.")
    # The default action of SIGTERM would leave the server running behind us.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    # Torch's threads wait by spinning; on a machine that has other work, too, that makes small models 50 times slower.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # uv compiles nothing; where nothing is kept either, each process compiles torch and ComfyUI for 10 seconds.
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    options, rest = parser().parse_known_args()
    if rest and options.command not in ("test", "release-check"):
        parser().error("unrecognized arguments: " + " ".join(rest))
    STATE.mkdir(exist_ok=True)
    try:
        sys.exit(run(options, rest))
    except KeyboardInterrupt:
        stop("Stopped.")


def run(options, rest):
    """The exit status of the command that `options` names."""
    if options.command == "lock":
        return environments.lock()
    comfyui, python = host(options)
    if options.command == "demo":
        return demo(comfyui, python, options)
    if options.command == "test":
        return pytest(comfyui, python, rest)
    if options.command == "gpu-kit":
        return gpu_kit.build(comfyui, environments.python_of(STATE / "tools"))
    if options.command == "docs":
        return watch([python, "docs.py"], comfyui)
    if options.command == "screenshots":
        return watch([python, "-m", "tools.screenshots", str(comfyui)], comfyui)
    if options.command == "release-check":
        return watch([python, "-m", "tools.release", *rest], comfyui)
    return check(comfyui, python)


def parser():
    text = "What developers of Personalize need, in this order. `dev.py COMMAND --help` has a command's options."
    top = argparse.ArgumentParser(prog="dev.py", description=text)
    commands = top.add_subparsers(dest="command", required=True, title="commands", metavar="COMMAND [OPTIONS]")
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument(
        "--comfyui",
        metavar="PATH",
        help="use this ComfyUI and its Python, and install nothing (default: COMFYUI_PATH, or one of our own)",
    )
    show = commands.add_parser("demo", parents=[shared], help="train the tiny model on one picture in a real ComfyUI")
    show.add_argument("--port", type=int, help="the server's port (default: a free one)")
    show.add_argument("--keep", action="store_true", help="leave the server running afterwards, to play with")
    show.add_argument("--steps", type=int, help="training steps (default: the value in demo/overrides.json)")
    show.add_argument("--seed", type=int, help="training seed (default: the value in demo/overrides.json)")
    commands.add_parser("check", parents=[shared], help="format, lint, types and the fast tests: before a commit")
    test = commands.add_parser("test", parents=[shared], help="all tests; further arguments go to pytest")
    versions = test.add_mutually_exclusive_group()
    for name, text in (("newest", "today's newest versions"), ("oldest", "the lowest versions in requirements.txt")):
        text += ", with a ComfyUI and an environment of our own"
        versions.add_argument(f"--{name}", dest="versions", action="store_const", const=name, help=text)
    commands.add_parser("docs", parents=[shared], help="write the tables of settings into the help pages")
    commands.add_parser("screenshots", parents=[shared], help="take the README's screenshots of the editor")
    commands.add_parser("lock", help="pin the newest versions of everything in tools/*.lock")
    commands.add_parser("gpu-kit", help="build .gpu/, to check a machine with a GPU")
    commands.add_parser("release-check", help="is this a release? (--tag v1.0.0: under this tag)", add_help=False)
    return top


# ---------------------------------------------------------------------------------------------------------------------
# The host: a ComfyUI folder and the Python that runs it


def host(options):
    """The ComfyUI folder and its Python: the given ones, or our own, made or finished now."""
    given, versions = getattr(options, "comfyui", None), getattr(options, "versions", None)
    if given and versions:
        stop(f"--{versions} sets up an environment of its own: leave out --comfyui.")
    given = given or os.environ.get("COMFYUI_PATH")
    if given and not versions and options.command != "release-check":
        return existing(Path(given).expanduser().resolve(), NEEDED_FOR.get(options.command, {}))
    return environments.made(versions or "locked")


def existing(comfyui, more):
    """A ComfyUI that is somebody's: checked for what all commands need and for `more`, never changed."""
    if not (comfyui / "main.py").is_file():
        stop(f"There is no ComfyUI (no main.py) in {comfyui}.")
    places = [comfyui / "venv", comfyui / ".venv", comfyui.parent / "venv", comfyui.parent / ".venv"]
    pythons = [environments.python_of(place) for place in places]
    pythons.append(comfyui.parent / "python_embeded" / "python.exe")
    python = next((p for p in pythons if p.exists()), Path(sys.executable))
    needed = {**NEEDED, **more}
    missing = missing_modules(python, list(needed))
    if missing:
        packages = " ".join(needed[name] for name in missing)
        stop(f"The Python of this ComfyUI lacks {packages}; install with: {python} -m pip install {packages}")
    return comfyui, python


def missing_modules(python, modules):
    script = f"import importlib.util as u; print(*[m for m in {modules!r} if u.find_spec(m) is None])"
    answer = ask(python, script)
    return modules if answer is None else answer.split()


# ---------------------------------------------------------------------------------------------------------------------
# The commands


def pytest(comfyui, python, arguments):
    """Runs pytest from the repository root; returns its exit status."""
    # The root is that of the repository: below tests/ a folder named `server` would hide ComfyUI's module.
    options = ["-c", "tests/pytest.ini", "--rootdir", ".", "--import-mode=importlib"]
    if not any(Path(a.split("::")[0]).exists() for a in arguments if not a.startswith("-")):
        arguments = ["tests", *arguments]
        # Each with a server of its own; in the order of tests/conftest.py, slow files first.
        options += ["-n", str(WORKERS), "--dist", "loadfile", "--no-loadscope-reorder"]
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // WORKERS)))
    return watch([python, "-m", "pytest", *options, *arguments], comfyui)


def check(comfyui, python):
    """Format, lint, types, fast tests: all four run, so that one look shows everything."""
    results = [
        watch([python, "-m", "ruff", "format", "--check", "."], comfyui),
        watch([python, "-m", "ruff", "check", "."], comfyui),
        watch([python, "-m", "mypy"], comfyui),
        pytest(comfyui, python, ["-m", FAST]),
    ]
    return max(results)


def demo(comfyui, python, options):
    # demo/ belongs to this repository and the client needs the standard library only, so it is imported right here.
    from demo import show

    return show.run(ROOT, STATE / "demo", ROOT / "demo_output", comfyui, python, options)


if __name__ == "__main__":
    main()
