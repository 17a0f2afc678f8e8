"""A custom-node folder without nodes for the demo host: it registers the tiny architecture when ComfyUI starts.

Link this folder into the host's custom_nodes (or copy it and set PERSONALIZE_DEMO to the demo folder).
architecture.py is loaded by its path: the repository's root must stay out of sys.path, where its folder nodes/ would
hide ComfyUI's nodes.py.
"""

import importlib.util
import os
from pathlib import Path


def _load_architecture():
    folder = Path(os.environ.get("PERSONALIZE_DEMO") or Path(__file__).resolve().parent.parent)
    spec = importlib.util.spec_from_file_location("personalize_demo_architecture", folder / "architecture.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


_load_architecture().register()
NODE_CLASS_MAPPINGS = {}
