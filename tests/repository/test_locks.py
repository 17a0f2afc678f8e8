"""Do the locks pin everything that is asked for, for every system, and name no place?"""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def pins(name):
    """{package: the lines that pin it} of a lock."""
    lines = (ROOT / "tools" / name).read_text().splitlines()
    found = {}
    for line in lines:
        if not line.startswith("#"):
            found.setdefault(line.partition("==")[0], []).append(line)
    return found


def packages(file):
    """The packages that a file of requirements names."""
    lines = [line.strip() for line in file.read_text().splitlines()]
    return {re.split(r"[\s<>=!~;]", line)[0].lower().replace("_", "-") for line in lines if line and line[0] != "#"}


@pytest.mark.parametrize("name", ["requirements.lock", "oldest.lock"])
def test_a_lock_pins_everything_that_is_asked_for(name, comfyui):
    files = [ROOT / "requirements.txt", ROOT / "tools" / "requirements.in"]
    if comfyui.parent == ROOT / ".dev":
        files.append(comfyui / "requirements.txt")
    assert set().union(*map(packages, files)) <= pins(name).keys()
    exact = re.compile(r"^[a-z0-9-]+==[0-9][\w.]*( ; .+)?$")
    assert not [line for lines in pins(name).values() for line in lines if not exact.match(line)]


@pytest.mark.parametrize("name", ["requirements.lock", "oldest.lock"])
def test_a_lock_names_no_place_and_no_registry(name):
    text = (ROOT / "tools" / name).read_text()
    assert "python dev.py lock" in text.splitlines()[1]
    assert not re.search(r"://|--|/|\\", text)


def test_the_lock_of_the_oldest_holds_the_lower_bounds():
    locked, bounds = pins("oldest.lock"), (ROOT / "requirements.txt").read_text().split()
    for bound in bounds:
        name, version = bound.split(">=")
        (line,) = locked[name.replace("_", "-")]
        assert re.fullmatch(rf"{re.escape(version)}(\.0)*", line.partition("==")[2])
