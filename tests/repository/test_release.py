"""Does release-check refuse what cannot be published, each thing by its own sentence, and pass what can?"""

import re
import shutil
from pathlib import Path

import pytest

from personalize.tools import environments, release

ROOT = Path(__file__).resolve().parents[2]
ADDRESS = "https://example.com/personalize"
NAMES = ["pyproject.toml", "README.md", "CHANGELOG.md", "requirements.txt"]


@pytest.fixture
def ready(tmp_path):
    """A copy of the files that are looked at, as they would be on the day of a release."""
    for name in NAMES:
        shutil.copy(ROOT / name, tmp_path / name)
    substitute(tmp_path / "pyproject.toml", "^(Repository|Icon) = .*", rf'\1 = "{ADDRESS}"')
    substitute(tmp_path / "README.md", "git clone .* personalize", f"git clone {ADDRESS} personalize")
    version = release.toml(tmp_path / "pyproject.toml")["project"]["version"]
    substitute(tmp_path / "CHANGELOG.md", "^## .*", f"## {version} (2026-12-01)")
    return tmp_path


def substitute(file, pattern, new):
    """Everywhere; on the day of a release the files already say something else than today."""
    text, count = re.subn(pattern, new, file.read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert count
    file.write_text(text, encoding="utf-8")


def change(file, old, new):
    text = file.read_text(encoding="utf-8")
    file.write_text(text.replace(old, new), encoding="utf-8")


def test_a_release_that_lacks_nothing_passes(ready):
    version = release.toml(ready / "pyproject.toml")["project"]["version"]
    assert release.obstacles(ready) == release.obstacles(ready, f"v{version}") == []


@pytest.mark.parametrize(
    ("name", "old", "new", "words"),
    [
        ("pyproject.toml", f'y = "{ADDRESS}"', f'y = "{release.PLACEHOLDER}"', "toml has no address"),
        ("README.md", ADDRESS, release.PLACEHOLDER, "README.md has no address yet: replace"),
        ("pyproject.toml", 'version = "', 'version = "7', "CHANGELOG.md begins with .* it must be '7"),
        ("CHANGELOG.md", "(2026-12-01)", "(unreleased)", r"unreleased\)': it must be '.* \(YEAR-MONTH-DAY\)'"),
        ("CHANGELOG.md", "## ", "", "begins with 'no version'"),
        ("requirements.txt", "peft", "peft2", "write the same lines into both"),
        ("pyproject.toml", "Repository =", "Homepage =", "lacks Repository"),
        ("pyproject.toml", "DisplayName =", "Name =", "lacks DisplayName"),
        ("pyproject.toml", "requires-comfyui = ", "requires-comfyui = '>=9' #", "asks for ComfyUI >=9"),
    ],
)
def test_what_is_lacking_is_the_only_thing_that_is_said(ready, name, old, new, words):
    change(ready / name, old, new)
    (sentence,) = release.obstacles(ready)
    assert re.search(words, sentence)


def test_the_tag_is_the_version(ready):
    (sentence,) = release.obstacles(ready, "v9.0.0")
    assert sentence.startswith("The tag is v9.0.0, but pyproject.toml has version")


def test_a_lock_that_uv_would_write_otherwise_is_named(tmp_path, monkeypatch):
    """uv is replaced: it leaves one lock as it is, changes the next, and cannot resolve the last."""
    locks = {name: tmp_path / f"{name}.lock" for name in ("same", "changed", "impossible")}
    for file in locks.values():
        file.write_text("a==1\n")
    (tmp_path / "state").mkdir()
    monkeypatch.setattr(release, "STATE", tmp_path / "state")
    monkeypatch.setattr(environments, "LOCKS", locks)
    monkeypatch.setattr(environments, "locking", lambda versions, comfyui, target: (versions, target))

    def logged(command):
        versions, target = command
        if versions == "changed":
            target.write_text("a==2\n")
        return versions == "impossible", ""

    monkeypatch.setattr(release, "logged", logged)
    changed, impossible = release.stale_locks(tmp_path)
    assert changed == "tools/changed.lock does not fit the requirements any more: run python dev.py lock."
    assert impossible.startswith("uv cannot resolve what impossible.lock is made from")
    assert all(file.read_text() == "a==1\n" for file in locks.values())
