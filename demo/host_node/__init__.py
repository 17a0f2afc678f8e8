"""Registers the demo's tiny architecture when ComfyUI starts, and its metric models with timm; it adds no nodes.

Link this folder into the host's custom_nodes (or copy it and set PERSONALIZE_DEMO to the demo folder).
Both files are loaded by their paths: the repository's root must stay out of sys.path, where its folder nodes/ would
hide ComfyUI's nodes.py.
"""

import importlib.util
import os
import sys
from pathlib import Path


def _load(name):
    folder = Path(os.environ.get("PERSONALIZE_DEMO") or Path(__file__).resolve().parent.parent)
    spec = importlib.util.spec_from_file_location(f"personalize_demo_{name}", folder / f"{name}.py")
    sys.modules[spec.name] = module = importlib.util.module_from_spec(spec)  # timm looks there
    spec.loader.exec_module(module)
    return module


_load("architecture").register()
_load("evaluator_models")  # registers itself
NODE_CLASS_MAPPINGS = {}
