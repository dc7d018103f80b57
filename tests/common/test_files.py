"""What killed writers left: ours goes, all else stays, and what was there before comes back."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from dfmcl.common.errors import BadInput, unwritable
from dfmcl.common.files import clear_parts, whole_directory, write_bytes


def test_a_kill_between_two_renames_loses_nothing(tmp_path: Path) -> None:
    """The directory was moved aside and the new one not in place yet: it is back even if the next writer fails."""
    (tmp_path / ".out.abcd_123.old").mkdir()
    (tmp_path / ".out.abcd_123.old" / "file").write_text("before")
    (tmp_path / ".out.abcd_123.part").mkdir()
    with pytest.raises(ZeroDivisionError), whole_directory(tmp_path / "out", ["file"]):
        raise ZeroDivisionError
    assert sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")) == ["out", "out/file"]
    assert (tmp_path / "out" / "file").read_text() == "before"


def test_only_what_is_staged_for_this_place_goes(tmp_path: Path) -> None:
    """Another place's staging, a file of such a name, a link, and what looks alike."""
    theirs = [".other.abcd1234.part", ".out.abcd.part", ".out.abcd1234.part.txt", "out.abcd1234.part", ".out.old"]
    for name in (*theirs, ".out.abcd1234.part"):
        (tmp_path / name).mkdir()
    (tmp_path / ".out.link5678.part").symlink_to(tmp_path / ".other.abcd1234.part")
    with whole_directory(tmp_path / "out", ["file"]) as staged:
        (staged / "file").write_text("new")
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*theirs, ".out.link5678.part", "out"])


def test_half_files_of_these_names_go(tmp_path: Path) -> None:
    """And no other file."""
    for name in (".a.json.12.part", ".b.json.12.part", ".a.json.part", ".a.json.x.part", "a.json.12.part"):
        (tmp_path / name).touch()
    clear_parts(tmp_path, {"a.json"})
    assert {path.name for path in tmp_path.iterdir()} == {
        ".b.json.12.part", ".a.json.part", ".a.json.x.part", "a.json.12.part",
    }  # fmt: skip
    clear_parts(tmp_path / "nothing")


def test_what_a_killed_signer_left_is_no_stranger(tmp_path: Path) -> None:
    """Half an attestation, or its lock, in a directory that its own command replaces; half of anything else is one."""
    (tmp_path / "out").mkdir()
    for name in (".file.12.part", ".file.lock"):
        (tmp_path / "out" / name).touch()
    with whole_directory(tmp_path / "out", ["file"]):
        pass
    (tmp_path / "out" / ".other.12.part").touch()
    with pytest.raises(BadInput, match=r"holds \.other\.12\.part"), whole_directory(tmp_path / "out", ["file"]):
        pass


def test_what_interrupts_a_write_leaves_no_half(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A second Ctrl-C in the middle of saving: the old file, and nothing beside it."""
    write_bytes(tmp_path / "file", b"old")

    def interrupted(handle: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("os.fsync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_bytes(tmp_path / "file", b"new")
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"old"]


@pytest.mark.parametrize("wrong", ["file/out", "/proc/out", "file/x/out"])
def test_a_wrong_place_is_the_users(tmp_path: Path, wrong: str) -> None:
    """Below a file, or where no file can be: bad input, for directories and files."""
    (tmp_path / "file").write_text("mine")
    with pytest.raises(BadInput, match="out: cannot be written"), whole_directory(tmp_path / wrong, []):
        pass
    with pytest.raises(BadInput, match="out: cannot be written"):
        write_bytes(tmp_path / wrong, b"")


def test_a_full_disk_is_not(tmp_path: Path) -> None:
    """No other argument would mend it."""
    assert unwritable(tmp_path, OSError(errno.ENOSPC, "full")).exit_code == 5
    assert unwritable(tmp_path, OSError(errno.EACCES, "no")).exit_code == 2
