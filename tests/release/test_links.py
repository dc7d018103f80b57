"""What lies in a repository and is no plain file of its own: nothing hangs on it, and nothing of it is believed."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from dfmcl.common.errors import BadInput, Broken, Refused
from dfmcl.gating.signing.attestation import BadEvidence, Trust, verify
from dfmcl.gating.signing.evidence import inspect
from dfmcl.release.candidate import read_manifest
from dfmcl.release.ledger import read_lines
from dfmcl.release.promotion import promote, prune, rollback
from dfmcl.release.status import standings
from dfmcl.release.stores.directory import LOCK, Directory
from dfmcl.release.stores.registry import store_at
from dfmcl.release.verification import verify_at, verify_release
from dfmcl.serving.triton.sight import look
from tests.signing import code_of

AT_ONCE = 5  # seconds of the processor, whatever else runs; who waits for a pipe waits for ever


@pytest.mark.parametrize("where", ["digits", "digits/1"])
def test_a_link_out_of_the_repository_is_believed_by_nobody(
    repository: Path, candidate: Path, evidence: Path, trust: Trust, trust_file: Path, where: str
) -> None:
    """However well signed its target is: not verified by any path, not promoted over, not listed as verified."""
    named = [repository / "digits", repository / "digits" / "1"]
    assert [verify_at(*store_at(path), trust) for path in named] == ["digits/1", "1"]
    path = repository / where
    target = repository.parent / "elsewhere"
    path.rename(target)
    path.symlink_to(target, target_is_directory=True)
    assert code_of("verify", str(repository / "digits"), "--trust", str(trust_file)) == 1
    if where == "digits/1":
        assert code_of("verify", str(repository / "digits" / "1"), "--trust", str(trust_file)) == 1
        with pytest.raises(BadEvidence, match="is a link that leaves its directory"):
            verify(path, path, trust)
        with pytest.raises(BadEvidence, match="is a link that leaves its directory"):
            inspect(path, path)
    with pytest.raises(Refused, match="promotion did not write this"):
        verify_release(Directory(repository), "digits")
    (row,) = standings(Directory(repository), trust)
    assert (row.champion, bool(row.trouble)) == (None, True)
    for change in (
        lambda: promote(candidate, evidence, Directory(repository), name="digits", trust=trust),
        lambda: rollback(Directory(repository), "digits", trust=trust, version=1),
        lambda: prune(Directory(repository), "digits", keep=1),
    ):
        with pytest.raises((Refused, BadInput)):
            change()
    assert sorted(entry.name for entry in target.iterdir()) == sorted(entry.name for entry in path.iterdir())
    assert not (path / "2").exists()


def as_fifo(path: Path) -> None:
    path.unlink(missing_ok=True)
    os.mkfifo(path)


def as_zeros(path: Path) -> None:
    path.unlink(missing_ok=True)
    path.symlink_to("/dev/zero")


def as_huge(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(300 * 2**20)


@pytest.mark.parametrize("spoil", [as_fifo, as_zeros, as_huge])
@pytest.mark.parametrize(
    "name", ["history.jsonl", "digits/config.pbtxt", "digits/1/manifest.json", "digits/1/report.json",
             "digits/1/attestation.intoto.jsonl"],
)  # fmt: skip
def test_no_file_of_a_repository_keeps_anybody_waiting(
    repository: Path, trust: Trust, trust_file: Path, name: str, spoil: Callable[[Path], None]
) -> None:
    """A FIFO, a device or 300 MB in place of any of them: the answer is no, in one moment, and not 5."""
    spoil(repository / name)
    begun = time.process_time()
    assert code_of("status", "--repository", str(repository), "--trust", str(trust_file)) in (1, 2)
    if name != "history.jsonl":
        assert code_of("verify", str(repository / "digits"), "--trust", str(trust_file)) in (1, 2)
    look(Directory(repository))
    assert time.process_time() - begun < AT_ONCE


def test_a_repository_whose_lock_is_a_pipe_or_a_link_keeps_nobody_waiting(
    repository: Path, candidate: Path, evidence: Path, trust: Trust
) -> None:
    """A pipe without a reader is locked like a file; a link is no lock, and what it names is not emptied."""
    as_fifo(repository / LOCK)
    begun = time.process_time()
    assert promote(candidate, evidence, Directory(repository), name="digits", trust=trust).version == 2
    assert time.process_time() - begun < AT_ONCE
    (repository / LOCK).unlink()
    (repository.parent / "mine").write_text("mine")
    (repository / LOCK).symlink_to(repository.parent / "mine")
    with pytest.raises(Broken, match="nothing was changed"):
        promote(candidate, evidence, Directory(repository), name="digits", trust=trust)
    assert (repository.parent / "mine").read_text() == "mine"


def test_a_manifest_says_one_thing(candidate: Path, tmp_path: Path) -> None:
    """A key twice, depth, or a size that nobody needs: bad input, whichever room reads it."""
    copied = shutil.copytree(candidate, tmp_path / "candidate")
    text = (candidate / "manifest.json").read_text()
    for other in (text.replace("{", '{"format": "dfmcl.candidate/1",', 1), "[" * 100_000, text.replace("1", "NaN", 1)):
        (copied / "manifest.json").write_text(other)
        with pytest.raises(BadInput, match=r"manifest\.json: not a candidate's manifest"):
            read_manifest(copied)
    as_huge(copied / "manifest.json")
    with pytest.raises(BadInput, match="at most 16,777,216 are read"):
        read_manifest(copied)


def test_a_damaged_line_of_the_history_is_a_damaged_line(repository: Path) -> None:
    """Also where it is deep, or says a thing twice."""
    path = repository / "history.jsonl"
    line = path.read_text()
    twice = line.replace("{", '{"version": 9, ', 1)
    path.write_text(line + "[" * 100_000 + "\n" + twice + json.dumps({"model": "x"}) + "\n")
    events, damaged = read_lines(Directory(repository))
    assert len(events) == 1
    assert [number for number, _ in damaged] == [2, 3, 4]
