"""A custom-node folder for a test server: the small models of tests/support, a node with their text encoders, and
fewer objects for collections to pass over.

They are loaded by their path: the repository's root must stay out of sys.path, where its folder nodes/ would hide
ComfyUI's nodes.py.
"""

import importlib
import sys
import types
from pathlib import Path

from server import PromptServer


def _register():
    package = types.ModuleType("personalize_random_models")
    package.__path__ = [str(Path(__file__).resolve().parent.parent / "support")]
    sys.modules[package.__name__] = package
    for name in ("random_sd", "random_native"):
        importlib.import_module(f"{package.__name__}.{name}").register()


def _with_modules_aside():
    aside = importlib.import_module("personalize_random_models.aside").ModulesAside(many=200)  # a library was loaded

    def handle(prompt):
        aside()
        return prompt

    return handle


class RandomText:
    """A CLIP of random numbers in the widths of a family, made of any other."""

    CATEGORY, FUNCTION, RETURN_TYPES = "tests", "make", ("CLIP",)

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"clip": ("CLIP",), "family": ("STRING", {})}}

    def make(self, clip, family):
        random_native = sys.modules["personalize_random_models.random_native"]
        return (random_native.RandomTextCLIP.made_of(clip, family),)


_register()
PromptServer.instance.add_on_prompt_handler(_with_modules_aside())
NODE_CLASS_MAPPINGS = {"TestsRandomText": RandomText}
