"""A custom-node folder without nodes for a test server: it registers the small models of tests/support.

They are loaded by their path: the repository's root must stay out of sys.path, where its folder nodes/ would hide
ComfyUI's nodes.py.
"""

import importlib
import sys
import types
from pathlib import Path


def _register():
    package = types.ModuleType("personalize_random_models")
    package.__path__ = [str(Path(__file__).resolve().parent.parent / "support")]
    sys.modules[package.__name__] = package
    for name in ("random_sd", "random_native"):
        importlib.import_module(f"{package.__name__}.{name}").register()


_register()
NODE_CLASS_MAPPINGS = {}
