"""Rounds on disk: whole lines only, bounded, and read again; whatever the disk does, probing goes on."""

from __future__ import annotations

import json
import os
import resource
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from dfmcl.monitoring.results import Query, Round, RoundFailure, RoundSkipped
from dfmcl.monitoring.round_log import RoundLog
from tests.monitoring.greys import measured, one_round, plan

MEASURED = measured(one_round(plan()))
FAILED = RoundFailure(2, "gateway", "m", "timeout", "late", 1.0, 2.0, (Query(4, 0.1), Query(3, 5.0, "timeout")))
SKIPPED = RoundSkipped(3, "triton", "m", "budget", "no room", 1.0)
PLAN = "a" * 64
LINE = len(json.dumps({"plan": PLAN, "round": FAILED.to_json()}, separators=(",", ":"))) + 1


def record(path: Path, max_bytes: int = 10**6, plan: str = PLAN) -> RoundLog:
    return RoundLog(path, max_bytes, plan)


def failure(number: int) -> RoundFailure:
    """Lines of one length, for numbers below ten."""
    return RoundFailure(number, *list(vars(FAILED).values())[1:])


def numbers(path: Path) -> list[int]:
    return [outcome.number for _, outcome in record(path).rounds()]


def test_what_was_written_is_read_again(tmp_path: Path) -> None:
    """Each kind of round, in order, by another process too; the directory is made."""
    path = tmp_path / "deep" / "rounds.jsonl"
    written: list[Round] = [MEASURED, FAILED, SKIPPED]
    first = record(path)
    for outcome in written:
        first.append(outcome)
    assert list(record(path).rounds()) == [(True, outcome) for outcome in written]
    assert first.failures == 0
    assert path.read_bytes().count(b"\n") == 3


def test_there_may_be_nothing_to_read(tmp_path: Path) -> None:
    """The first start."""
    assert list(record(tmp_path / "none.jsonl").rounds()) == []


def test_a_long_record_is_read_from_its_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A start must not take minutes: the newest rounds, over both files."""
    monkeypatch.setattr("dfmcl.monitoring.round_log.READ_AGAIN", 4)
    path = tmp_path / "rounds.jsonl"
    log = record(path, max_bytes=3 * LINE)
    for number in range(1, 10):
        log.append(failure(number))
    assert numbers(path) == [6, 7, 8, 9]


def test_rounds_of_another_plan_are_told_apart(tmp_path: Path) -> None:
    """Figures of other images or attacks are not continued; the rounds are there."""
    path = tmp_path / "rounds.jsonl"
    record(path, plan="b" * 64).append(FAILED)
    record(path).append(SKIPPED)
    assert list(record(path).rounds()) == [(False, FAILED), (True, SKIPPED)]


def test_two_files_never_hold_more_than_is_allowed(tmp_path: Path) -> None:
    """What would grow beyond it moves aside, in place of the one before; the newest rounds are read, in order."""
    path = tmp_path / "rounds.jsonl"
    log = record(path, max_bytes=3 * LINE)
    for number in range(1, 10):
        log.append(failure(number))
        assert path.stat().st_size <= 3 * LINE
    assert sorted(one.name for one in tmp_path.iterdir()) == ["rounds.jsonl", "rounds.jsonl.1"]
    assert numbers(path) == [4, 5, 6, 7, 8, 9]


@pytest.mark.parametrize(
    "rubbish",
    [
        b"",
        b"not JSON",
        b"{}",
        b"[1]",
        b"null",
        b'{"plan": "x", "round": {"format": "dfmcl.round/9"}}',
        b'{"plan": "x", "round": 3}',
        b"\xff\xfe",
        b"[" * 100_000,
        b'{"plan": "x", "round": {"format": "dfmcl.round/2", "outcome": "failed", "via": "pigeon", "queries": []}}',
    ],
    ids=lambda rubbish: repr(rubbish[:20]),
)
def test_lines_that_are_no_rounds_are_left_out(tmp_path: Path, rubbish: bytes) -> None:
    """Whatever stands in the file, the rounds around it are read."""
    path = tmp_path / "rounds.jsonl"
    record(path).append(FAILED)
    with path.open("ab") as file:
        file.write(rubbish + b"\n")
    record(path).append(SKIPPED)
    assert [outcome for _, outcome in record(path).rounds()] == [FAILED, SKIPPED]


def test_half_a_line_costs_no_other(tmp_path: Path) -> None:
    """A process that was killed while it wrote leaves half a line; the next round stands on a line of its own."""
    path = tmp_path / "rounds.jsonl"
    record(path).append(FAILED)
    path.write_bytes(path.read_bytes() * 2)
    os.truncate(path, LINE + LINE // 2)
    record(path).append(SKIPPED)
    assert [outcome for _, outcome in record(path).rounds()] == [FAILED, SKIPPED]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 16 KB."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=16k", "none", place], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"needs to mount a tmpfs: {mounted.stderr.decode().strip()}")
    yield place
    subprocess.run(["umount", place], check=True)


def test_a_full_disk_is_counted_and_leaves_whole_lines(small_disk: Path) -> None:
    """On a real full file system: what did not fit is counted, and once there is room, rounds are written again."""
    ballast = small_disk / "ballast"
    ballast.write_bytes(b"x" * 8192)
    path = small_disk / "rounds.jsonl"
    log = record(path)
    for number in range(1, 100):
        log.append(failure(number))
    assert log.failures > 0
    kept = numbers(path)
    assert kept == list(range(1, 100 - log.failures))
    assert path.read_bytes().endswith(b"\n")
    ballast.unlink()
    failures = log.failures
    log.append(failure(100))
    assert log.failures == failures
    assert numbers(path) == [*kept, 100]


def test_a_write_that_stops_in_the_middle_is_taken_back(tmp_path: Path) -> None:
    """A limit that falls inside a line, as a disk's does: the part that was written is cut off again."""
    path = tmp_path / "rounds.jsonl"
    room, (soft, hard) = 3 * LINE + LINE // 2, resource.getrlimit(resource.RLIMIT_FSIZE)
    log = record(path)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))  # of this process, whose SIGXFSZ Python ignores
    try:
        for number in range(1, 10):
            log.append(failure(number))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert log.failures == 6
    assert path.stat().st_size == 3 * LINE
    assert numbers(path) == [1, 2, 3]


@pytest.mark.parametrize("obstacle", ["directory", "file in the way"])
def test_a_place_that_cannot_be_had_is_counted(tmp_path: Path, obstacle: str) -> None:
    """A path that is a directory, or lies below a file: nothing is raised, to write or to read."""
    path = tmp_path / "rounds.jsonl"
    if obstacle == "directory":
        path.mkdir()
    else:
        path.write_text("")
        path = path / "rounds.jsonl"
    log = record(path)
    read: list[tuple[bool, Round]] = list(log.rounds())
    log.append(FAILED)
    assert read == []
    assert log.failures >= 1
