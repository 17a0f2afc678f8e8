"""A custom-node folder without nodes for a test server: it registers random_sd.py's small models.

random_sd.py is loaded by its path: the repository's root must stay out of sys.path, where its folder nodes/ would hide
ComfyUI's nodes.py.
"""

import importlib.util
from pathlib import Path


def _load_models():
    path = Path(__file__).resolve().parent.parent / "support" / "random_sd.py"
    spec = importlib.util.spec_from_file_location("random_sd", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


_load_models().register()
NODE_CLASS_MAPPINGS = {}
