"""Modules that exist in name only: any attribute is a class, any submodule too. For what the check never uses."""

import importlib.abc
import importlib.machinery
import sys
import types

NAMES = ("av", "kornia", "comfy_angle", "OpenGL")


class Anything(type):
    """A class that has whatever is asked of it."""

    def __getattr__(cls, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return make(name)

    def __or__(cls, other):
        return cls

    def __ror__(cls, other):
        return cls


def make(name):
    return Anything(name, (), {"__init__": lambda self, *a, **k: None, "__init_subclass__": classmethod(accept)})


def accept(cls, **options):
    pass


class Module(types.ModuleType):
    __path__ = []

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        value = make(name)
        setattr(self, name, value)
        return value


class Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in NAMES:
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec):
        return Module(spec.name)

    def exec_module(self, module):
        pass


sys.meta_path.append(Finder())
