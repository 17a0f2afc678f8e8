"""Files that replace others: their names, their modes, and what a killed process left."""

import os
import stat

import pytest
import torch
from safetensors.torch import save_file

from personalize.trainers import files


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
