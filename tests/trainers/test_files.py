"""Files that replace others: their names, their modes, and what a killed process left."""

import os
import stat

import pytest
import torch
from safetensors.torch import save_file

from personalize.trainers import files
from personalize.trainers.runs.folder import RunFolder
from personalize.trainers.text import reason, remedy


@pytest.fixture(params=[0o022, 0o027, 0o002])
def umask(request):
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def mode(path):
    return stat.S_IMODE(path.stat().st_mode)


def write(path, value=1.0):
    with files.replaced(path) as temporary:
        save_file({"a": torch.full((2,), value)}, temporary)


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such modes")
def test_a_new_file_has_the_mode_of_any_new_file(tmp_path, umask):
    """safetensors' own is 0600."""
    write(tmp_path / "a.safetensors")
    assert mode(tmp_path / "a.safetensors") == 0o666 & ~umask


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such modes")
@pytest.mark.parametrize("earlier", [0o664, 0o600, 0o640])
def test_a_file_that_is_replaced_keeps_its_mode(tmp_path, earlier):
    write(tmp_path / "a.safetensors")
    os.chmod(tmp_path / "a.safetensors", earlier)
    write(tmp_path / "a.safetensors", 2.0)
    assert mode(tmp_path / "a.safetensors") == earlier
    assert files.tensors(tmp_path / "a.safetensors")[0]["a"].tolist() == [2.0, 2.0]


def test_a_planted_link_is_not_written_through(tmp_path):
    """Neither one of the name that is written, nor one of a name that a temporary file might have."""
    (tmp_path / "theirs.txt").write_text("theirs")
    for name in ("a.tmp", "a.txt"):
        (tmp_path / name).symlink_to(tmp_path / "theirs.txt")
    with files.replaced(tmp_path / "a.txt") as temporary:
        temporary.write_text("ours")
    assert (tmp_path / "theirs.txt").read_text() == "theirs"
    assert (tmp_path / "a.txt").read_text() == "ours" and not (tmp_path / "a.txt").is_symlink()


def test_two_writers_do_not_share_a_temporary_file(tmp_path):
    with files.replaced(tmp_path / "a.txt") as first, files.replaced(tmp_path / "a.txt") as second:
        first.write_text("first")
        second.write_text("second")
    assert (tmp_path / "a.txt").read_text() == "first"  # it ended last


def test_an_error_leaves_the_earlier_file_alone(tmp_path):
    (tmp_path / "a.txt").write_text("earlier")
    with pytest.raises(OSError, match="full"), files.replaced(tmp_path / "a.txt") as temporary:
        temporary.write_text("half")
        raise OSError("full")
    assert [file.name for file in tmp_path.iterdir()] == ["a.txt"] and (tmp_path / "a.txt").read_text() == "earlier"


def test_what_a_killed_process_left_goes_after_a_day(tmp_path):
    """Not what another process may be writing now, and not what is of another file."""
    old, new, other = (tmp_path / f"{name}.tmp" for name in ("a.0123456789abcdef", "a.0123456789abcdee", "b.x"))
    for file in (old, new, other):
        file.write_text("x")
    for file in (old, other):
        os.utime(file, (0, 0))
    write(tmp_path / "a.safetensors")
    assert sorted(file.name for file in tmp_path.iterdir()) == [new.name, "a.safetensors", other.name]


# -- paths that are too long


def test_a_path_that_is_too_long_is_named_before_anything_is_written(tmp_path, monkeypatch):
    """As on Windows, which would say that there is no such folder."""
    path = tmp_path / "mine.safetensors"
    monkeypatch.setattr(files, "LONGEST", len(str(tmp_path)) + 1 + len("mine.0123456789abcdef.tmp") - 1)
    with pytest.raises(OSError) as error:
        write(path)
    assert (reason(error.value), remedy(error.value)) == (
        "File name too long",
        "use a shorter name, or move ComfyUI to a folder with a shorter path",
    )
    with pytest.raises(
        ValueError, match=r"^The path of mine would be \d+ characters long and this system allows \d+: "
    ):
        files.check_length(path, "mine")
    assert not [*tmp_path.iterdir()]
    monkeypatch.setattr(files, "LONGEST", files.LONGEST + 1)
    write(path)
    files.check_length(path, "mine")


def test_no_file_of_a_run_has_a_longer_name_than_is_checked(tmp_path, monkeypatch):
    folder = RunFolder(tmp_path / "0123456789abcdef")
    monkeypatch.setattr(files, "LONGEST", len(str(folder.path / "states" / "step_000050" / "lora")) + 19)
    with pytest.raises(ValueError, match="^The path of the run 0123456789abcdef would be"), folder.lock():
        pass
    assert not folder.path.exists()


def test_save_refuses_a_path_that_is_too_long_before_the_training(model_folders, monkeypatch):
    from personalize.nodes.save import Save

    assert Save.validate_inputs(name="mine") is True
    longest = len(str(model_folders["checkpoints"])) + 30
    monkeypatch.setattr(files, "LONGEST", longest)
    assert "The path of the file mine_and_mine.safetensors in " in Save.validate_inputs(name="mine_and_mine")
