"""What is absent, unreadable or half there is told apart from what is new."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from dfmcl.release.ledger import is_retired
from dfmcl.release.promotion import retire
from dfmcl.release.stores import directory
from dfmcl.release.stores.directory import Directory
from dfmcl.serving.triton import sight


def test_a_whole_model_has_a_mark_that_changes_with_it(repository: Path) -> None:
    """With its config, and with each file of its version."""
    [(name, mark)] = sight.look(Directory(repository)).marks.items()
    assert (name, mark.version) == ("digits", 1)
    assert sight.look(Directory(repository)).marks == {"digits": mark}
    report = repository / "digits" / "1" / "report.json"
    report.write_bytes(report.read_bytes() + b" ")
    assert sight.look(Directory(repository)).marks["digits"] != mark


@pytest.mark.parametrize("number", [errno.ESTALE, errno.EIO, errno.EACCES])
@pytest.mark.parametrize("where", ["the repository", "the config", "a file"])
def test_storage_that_fails_is_no_absence(
    repository: Path, monkeypatch: pytest.MonkeyPatch, number: int, where: str
) -> None:
    """A stale handle of NFS, a failing disk, a permission: no test can make these, as tests may be run by root."""

    def fail(path: Path, *arguments: object) -> None:
        raise OSError(number, os.strerror(number), str(path))

    real = Path.stat
    if where == "the repository":
        monkeypatch.setattr(Path, "iterdir", fail)
    elif where == "the config":
        monkeypatch.setattr(directory, "read_plain", fail)
    else:
        monkeypatch.setattr(Path, "stat", lambda path, **kw: fail(path) if path.name == "report.json" else real(path))
    seen = sight.look(Directory(repository))
    assert seen.marks == {}
    [(name, trouble)] = seen.troubles.items()
    assert name == ("" if where == "the repository" else "digits")
    assert f"cannot be read: {os.strerror(number)}" in str(trouble)


def test_only_the_history_says_that_a_model_is_retired(repository: Path) -> None:
    """Its directory may be away for a moment."""
    away = (repository / "digits").rename(repository / ".away")
    assert sight.look(Directory(repository)) == sight.Sight()
    assert not is_retired(Directory(repository), "digits")
    away.rename(repository / "digits")
    retire(Directory(repository), "digits")
    assert sight.look(Directory(repository)) == sight.Sight()
    assert is_retired(Directory(repository), "digits")
