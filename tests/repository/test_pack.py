"""The pack as a whole: does it import light, is trainers/ free of the host, do its two lists of packages agree?"""

import logging
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
HEAVY = {"torch", "torchvision", "numpy", "PIL", "diffusers", "transformers", "peft", "accelerate"}
HEAVY |= {"open_clip", "timm", "einops", "matplotlib", "safetensors"}
HOST = ["comfy", "comfy_api", "comfy_extras", "comfy_execution", "nodes", "folder_paths", "server", "execution"]

# Loads the repository as ComfyUI loads a custom node: by path, under a name that is no identifier.
IMPORT_PACK = f"""
import importlib.util, sys
spec = importlib.util.spec_from_file_location(
    "/x/personalize", {str(ROOT / "__init__.py")!r}, submodule_search_locations=[{str(ROOT)!r}])
sys.modules["/x/personalize"] = module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
print(*{{name.split(".")[0] for name in sys.modules}})
"""

# Every module of trainers/, with any attempt to import a module of the host turned into a failure.
IMPORT_TRAINERS = f"""
import importlib, pkgutil, sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {HOST!r}:
            raise AssertionError(f"trainers imports {{name}}")

sys.meta_path.insert(0, Refuse())
sys.path.insert(0, {str(ROOT)!r})
import trainers
for module in pkgutil.walk_packages(trainers.__path__, "trainers."):
    if not module.name.endswith("__main__"):
        importlib.import_module(module.name)
        print(module.name)
"""


def python(script, cwd):
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=cwd)
    assert result.returncode == 0, result.stderr
    return result.stdout.split()


def test_importing_the_pack_imports_nothing_heavy(tmp_path):
    assert not HEAVY & set(python(IMPORT_PACK, tmp_path))


def test_trainers_imports_no_module_of_the_host(tmp_path):
    assert "trainers.training.loop" in python(IMPORT_TRAINERS, tmp_path)


@pytest.mark.parametrize("library", ["diffusers", "transformers", "peft"])
def test_a_deprecation_in_a_library_fails_a_test(library):
    with pytest.raises(FutureWarning):
        warnings.warn_explicit("old", FutureWarning, "x.py", 1, module=f"{library}.models.x")
    with pytest.raises(DeprecationWarning):
        logging.getLogger(f"{library}.models.x").warning("`x` is deprecated, use `y`")


def test_the_requirements_are_those_of_the_project():
    assert read_lines("requirements.txt") == project()["dependencies"]


def test_the_requirements_never_pin_and_leave_out_what_the_host_brings():
    for line in read_lines("requirements.txt"):
        name, bound = line.split(">=")
        assert name not in ("torch", "torchvision", "torchaudio", "transformers", "numpy", "Pillow")
        assert bound.replace(".", "").isdigit()


def test_the_project_asks_for_the_host_that_the_tests_run(comfyui):
    version = (comfyui / "comfyui_version.py").read_text().split('"')[-2]
    if comfyui.parent != ROOT / ".dev":
        pytest.skip("another ComfyUI is in use")
    assert toml()["tool"]["comfy"]["requires-comfyui"] == f">={version}"


def read_lines(name):
    lines = (ROOT / name).read_text(encoding="utf-8").splitlines()
    return [line for line in lines if line and not line.startswith("#")]


def toml():
    # Python 3.10 has no tomllib; pytest brings tomli there.
    try:
        import tomllib
    except ModuleNotFoundError:
        import tomli as tomllib
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def project():
    return toml()["project"]
