"""A lock on a place: held by one, named, taken back from the dead, and gone afterwards."""

from __future__ import annotations

import errno
import fcntl
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from dfmcl.common.errors import BadInput
from dfmcl.common.locks import Taken, held

ROUNDS = """
import sys
from pathlib import Path
from dfmcl.common.locks import Taken, held
place, done = Path(sys.argv[1]), 0
while done < 200:
    try:
        with held(place / ".lock", place):
            (place / "inside").touch(exist_ok=False)
            (place / "inside").unlink()
            done += 1
    except Taken:
        pass
"""


def test_it_goes_with_the_directories_that_were_made_for_it(tmp_path: Path) -> None:
    """What the block wrote stays, and so does what was there before."""
    with held(tmp_path / "a" / "b" / ".lock", tmp_path):
        assert (tmp_path / "a" / "b" / ".lock").is_file()
    assert list(tmp_path.iterdir()) == []
    with held(tmp_path / "a" / "b" / ".lock", tmp_path):
        (tmp_path / "a" / "file").touch()
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["a", "file"]


def test_only_one_is_ever_inside(tmp_path: Path) -> None:
    """Three processes enter and leave 200 times each, by a file that each removes, in a directory that each removes."""
    place = str(tmp_path / "place")
    started = [subprocess.Popen([sys.executable, "-c", ROUNDS, place], stderr=subprocess.PIPE) for _ in range(3)]
    errors = [process.communicate(timeout=240)[1] for process in started]
    assert errors == [b"", b"", b""]
    assert list(tmp_path.rglob("*")) in ([], [tmp_path / "place"])  # empty, where one came while another made it


@pytest.mark.parametrize("error", [FileExistsError, FileNotFoundError])
def test_a_directory_that_goes_while_it_is_made_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: type[OSError]
) -> None:
    """Another process makes it first, and removes it before we look: mkdir says that it is there, or that it is not."""
    made, seen = Path.mkdir, []

    def raced(path: Path, *words: object, **named: object) -> None:
        seen.append(path)
        if len(seen) == 1:
            raise error(0, "raced", str(path))
        made(path, *words, **named)  # type: ignore[arg-type]

    monkeypatch.setattr(Path, "mkdir", raced)
    with held(tmp_path / "place" / "lock", tmp_path / "run"):
        assert (tmp_path / "place" / "lock").exists()
    assert len(seen) > 1


def test_a_file_where_the_directory_should_be_is_bad_input(tmp_path: Path) -> None:
    """It does not go away, however often it is tried."""
    (tmp_path / "place").write_text("mine")
    with pytest.raises(BadInput, match="run: cannot be written"), held(tmp_path / "place" / "lock", tmp_path / "run"):
        pass


def test_it_is_named_and_not_taken_twice(tmp_path: Path) -> None:
    """Also within one process; afterwards it is free."""
    lock, run = tmp_path / "lock", tmp_path / "run"
    named = rf"run: process {os.getpid()} on "
    with held(lock, run), pytest.raises(Taken, match=named), held(lock, run):
        pass
    with held(lock, run):
        pass


def test_a_holder_that_did_not_say_who_it_is_holds_too(tmp_path: Path) -> None:
    """It may have been stopped before it wrote its number."""
    lock, run = tmp_path / "lock", tmp_path / "run"
    with lock.open("w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(Taken, match=r"run: another process writes there"), held(lock, run):
            pass


def test_a_link_in_its_place_is_not_followed(tmp_path: Path) -> None:
    """A lock is written into; what a link names is not ours."""
    (tmp_path / "mine").write_text("mine")
    (tmp_path / "lock").symlink_to("mine")
    with pytest.raises(BadInput, match="run: cannot be written"), held(tmp_path / "lock", tmp_path / "run"):
        pass
    assert (tmp_path / "mine").read_text() == "mine"


def test_a_pipe_in_its_place_is_bad_input(tmp_path: Path) -> None:
    """Nothing can be written into it that names a holder."""
    os.mkfifo(tmp_path / "lock")
    said = r"run: .*/lock, its lock, is no regular file"
    with pytest.raises(BadInput, match=said), held(tmp_path / "lock", tmp_path / "run"):
        pass


def test_a_file_system_without_locks_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No such one is at hand; this is what Lustre without `flock` answers."""

    def unsupported(*arguments: Any) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(fcntl, "flock", unsupported)
    said = r"run: cannot be locked .Function not implemented."
    with pytest.raises(BadInput, match=said), held(tmp_path / "lock", tmp_path / "run"):
        pass
