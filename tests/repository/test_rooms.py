"""Rooms of the house: does every import point downwards, is every folder small, is the host met in one room only?"""

import ast
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
GROUND = {"settings", "text", "files", "digest", "images", "device"}  # modules of trainers/ that lie in no room
# A room -> the rooms that it may import from, beside its own.
BELOW = {
    "ground": set(),
    "models": {"ground"},
    "metrics": {"ground"},
    "data": {"ground", "models", "metrics"},
    "formats": {"ground", "models"},
    "training": {"ground", "models", "data"},
    "recipes": {"ground", "models", "metrics", "data", "training"},
    "stopping": {"ground", "models", "metrics", "data", "training"},
    "evaluation": {"ground", "models", "metrics", "data"},
    "runs": {"ground", "models", "metrics", "data", "formats", "training", "recipes", "stopping"},
}
BELOW["reports"] = {*BELOW["runs"], "runs", "evaluation"}
BELOW["cli"] = {*BELOW["reports"], "reports"}
BELOW[""] = {*BELOW["cli"], "cli"}  # __main__ alone
HOST = {"comfy", "server", "folder_paths", "execution", "nodes", "comfy_execution", "app", "latent_preview"}


def imports(file, root=ROOT):
    """The absolute names of what a module imports, `trainers.data.concept.Concept` among them, and their lines."""
    package = file.relative_to(root).parent.parts
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            name = ".".join([*base, *filter(None, [node.module])])
            yield from ((f"{name}.{alias.name}" if node.level else name, node.lineno) for alias in node.names)


def room(name):
    """`trainers.data.concept` -> "data"."""
    part = name.split(".")[1] if "." in name else ""
    return "ground" if part in GROUND else "" if part == "__main__" else part


def upward(root):
    """Every import in trainers/ that points upwards or sideways, as `file:line`."""
    found = []
    for file in sorted((root / "trainers").rglob("*.py")):
        here = room(".".join(file.relative_to(root).with_suffix("").parts))
        for name, line in imports(file, root):
            if name.startswith("trainers.") and room(name) != here and room(name) not in BELOW[here]:
                found.append(f"{file.relative_to(root)}:{line} imports {name}")
    return found


def test_every_import_points_downwards():
    assert upward(ROOT) == []


def test_an_upward_import_is_found(tmp_path):
    """Planted: a loss that reads a run."""
    losses = tmp_path / "trainers" / "training" / "losses.py"
    losses.parent.mkdir(parents=True)
    losses.write_text("from ..data.batch import Batch\nfrom ..runs.run import Run\n")
    assert upward(tmp_path) == ["trainers/training/losses.py:2 imports trainers.runs.run.Run"]


def test_no_module_imports_itself_through_others():
    graph = {}
    for file in (ROOT / "trainers").rglob("*.py"):
        name = ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        graph[name] = {found for found, _ in imports(file)}
    graph = {name: {_module(found, graph) for found in names} & graph.keys() for name, names in graph.items()}
    done = set()

    def visit(name, path):
        assert name not in path, " -> ".join([*path[path.index(name) :], name])
        if name not in done:
            for other in graph[name]:
                visit(other, [*path, name])
            done.add(name)

    for name in graph:
        visit(name, [])


def _module(name, graph):
    return name if name in graph else name.rpartition(".")[0]


def test_only_nodes_host_imports_the_hosts_insides():
    """comfy_api, which is made for node packs, may be imported in all of nodes/."""
    found = [
        f"{file.relative_to(ROOT)}:{line} imports {name}"
        for folder in ("nodes", "trainers")
        for file in sorted((ROOT / folder).rglob("*.py"))
        if "host" not in file.relative_to(ROOT).parts
        for name, line in imports(file)
        if name.split(".")[0] in HOST and not name.startswith("nodes.")
    ]
    assert found == []


@pytest.mark.parametrize(("top", "most"), [("trainers", 14), ("nodes", 18)])
def test_no_folder_holds_more_files_than_one_can_survey(top, most):
    files = [file.parent.relative_to(ROOT) for file in (ROOT / top).rglob("*.py") if file.name != "__init__.py"]
    assert {str(folder): count for folder, count in Counter(files).items() if count > most} == {}
