"""Is this a release that can be published? `python dev.py release-check` says what still stands in its way."""

import argparse
import re
import shutil
import sys

from . import environments
from .children import ROOT, STATE, logged

# Stands for the repository's address until it has one: in pyproject.toml and README.md.
PLACEHOLDER = "REPOSITORY_ADDRESS"


def obstacles(root, tag=None):
    """A sentence for each thing that is wrong with the files below `root`, without asking a registry.

    Args:
        tag: of the commit that is to be published, `v` and a version.
    """
    project = toml(root / "pyproject.toml")
    return [
        *addresses(root),
        *versions(root, project, tag),
        *lists(root, project),
        *metadata(project),
    ]


def addresses(root):
    for name in ("pyproject.toml", "README.md"):
        lines = (root / name).read_text(encoding="utf-8").splitlines()
        found = [str(n) for n, line in enumerate(lines, 1) if PLACEHOLDER in line]
        if found:
            yield f"{name} has no address yet: replace {PLACEHOLDER} in line {', '.join(found)} with the repository's."


def versions(root, project, tag):
    version = project["project"]["version"]
    top = re.search(r"^## (.*)$", (root / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    if not top or not re.fullmatch(re.escape(version) + r" \(\d{4}-\d\d-\d\d\)", top[1]):
        yield f"CHANGELOG.md begins with {top[1] if top else 'no version'!r}: it must be '{version} (YEAR-MONTH-DAY)'."
    if tag and tag != f"v{version}":
        yield f"The tag is {tag}, but pyproject.toml has version {version}: tag v{version}."


def lists(root, project):
    lines = (root / "requirements.txt").read_text(encoding="utf-8").splitlines()
    if [line for line in lines if line and line[0] != "#"] != project["project"]["dependencies"]:
        yield "requirements.txt and the dependencies in pyproject.toml differ: write the same lines into both."


def metadata(project):
    urls, comfy = project["project"].get("urls", {}), project.get("tool", {}).get("comfy", {})
    fields = {"Repository": urls} | dict.fromkeys(("PublisherId", "DisplayName", "Icon", "requires-comfyui"), comfy)
    missing = [name for name, table in fields.items() if not table.get(name)]
    if missing:
        yield f"pyproject.toml lacks {', '.join(missing)}: the registry shows and needs them."
    needed = f">={environments.COMFYUI_VERSION}"
    if comfy.get("requires-comfyui") != needed:
        yield f"pyproject.toml asks for ComfyUI {comfy.get('requires-comfyui')}, but the tests run {needed[2:]}."


def stale_locks(comfyui):
    """A sentence for each lock that other versions would fill, were it written again without need."""
    for versions, file in environments.LOCKS.items():
        copy = STATE / file.name
        shutil.copy(file, copy)
        status, output = logged(environments.locking(versions, comfyui, copy))
        if status:
            yield f"uv cannot resolve what {file.name} is made from: run python dev.py lock to see why."
        elif copy.read_bytes() != file.read_bytes():
            yield f"tools/{file.name} does not fit the requirements any more: run python dev.py lock."


def toml(path):
    # Python 3.10 has no tomllib; pytest brings tomli there.
    try:
        import tomllib
    except ModuleNotFoundError:
        import tomli as tomllib
    return tomllib.loads(path.read_text(encoding="utf-8"))


def main():
    options = argparse.ArgumentParser(prog="dev.py release-check")
    options.add_argument("--tag", help="the tag that is to be published, such as v1.0.0")
    found = obstacles(ROOT, options.parse_args().tag) + [*stale_locks(STATE / "ComfyUI")]
    print("\n".join(found) if found else "Ready to be published.")
    sys.exit(bool(found))


if __name__ == "__main__":
    main()
