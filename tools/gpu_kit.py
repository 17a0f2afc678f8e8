"""Builds .gpu/: what a machine with a GPU and without a network needs to run benchmarks/gpu/check.sh, about 25 MB.

That machine brings PyTorch for CUDA, transformers and peft under Python 3.12 on x86-64 Linux; the kit holds the other
packages as wheels, and a ComfyUI without its documents. It travels next to the repository's files.
"""

import shutil
import tarfile
import tempfile
from pathlib import Path

from .children import ROOT, STATE, call, step

KIT = ROOT / ".gpu"
WHEELS = ROOT / "benchmarks" / "gpu" / "wheels.txt"
LEFT_OUT = ("blueprints", "comfy_api_nodes", "openapi.yaml", "script_examples", "tests", "tests-unit")
# The video decoder does not travel: Load Image falls back to Pillow, as it does where a file is no video.
DECODED = "components = InputImpl.VideoFromFile(image_path).get_components()"
INSTEAD = 'components = type("WithoutVideo", (), {"images": torch.empty(0)})()'
PLATFORMS = ("manylinux_2_28", "manylinux_2_27", "manylinux_2_17", "manylinux2014", "manylinux2010", "manylinux_2_12")


def build(comfyui, python):
    """Write the kit anew and return the exit status.

    Args:
        comfyui: the folder of a whole ComfyUI.
        python: that of an environment with pip.
    """
    shutil.rmtree(KIT, ignore_errors=True)
    (KIT / "whl").mkdir(parents=True)
    tags = [part for name in PLATFORMS for part in ("--platform", f"{name}_x86_64")] + ["--platform", "any"]
    target = ["--python-version", "3.12", "--implementation", "cp", "--abi", "cp312", "--abi", "abi3", "--abi", "none"]
    with step("getting wheels"):
        for wanted in WHEELS.read_text(encoding="utf-8").split():
            command = [python, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", *target, *tags]
            call([*command, "-d", KIT / "whl", wanted], f"Getting {wanted}")
    with step("packing ComfyUI"):
        pack(comfyui)
    size = sum(file.stat().st_size for file in KIT.rglob("*") if file.is_file())
    print(f"{KIT.name}/ holds {size / 1e6:.0f} MB; on the machine with the GPU: bash benchmarks/gpu/check.sh")
    return 0


def pack(comfyui):
    """ComfyUI as a tar file, without what a check never needs."""
    with tempfile.TemporaryDirectory(dir=STATE) as folder:
        copy = Path(folder) / "ComfyUI"
        shutil.copytree(comfyui, copy, ignore=shutil.ignore_patterns(*LEFT_OUT, "__pycache__", ".git"))
        text = (copy / "nodes.py").read_text(encoding="utf-8")
        (copy / "nodes.py").write_text(text.replace(DECODED, INSTEAD), encoding="utf-8")
        (copy / "comfy_extras" / "nodes_glsl.py").write_text("NODE_CLASS_MAPPINGS = {}\n")  # needs OpenGL
        with tarfile.open(KIT / "comfyui.tar.xz", "w:xz") as tar:
            tar.add(copy, "ComfyUI")
