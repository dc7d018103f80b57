"""`dfmcl watch` as a process: a signal ends it between two questions, and the next one goes on where it was."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from dfmcl.monitoring.results import round_from_json

Make = Callable[..., Any]
ROOT = Path(__file__).parents[2]


@pytest.fixture
def command(tmp_path: Path) -> Iterator[Callable[[], tuple[subprocess.Popen[bytes], Path]]]:
    """`command()` starts the real command on the configuration that was written; returns it and its log."""
    running: list[subprocess.Popen[bytes]] = []

    def start() -> tuple[subprocess.Popen[bytes], Path]:
        log = tmp_path / f"watch{len(running)}.log"
        program = [str(Path(sys.executable).with_name("dfmcl")), "watch", "--config", str(tmp_path / "watch.toml")]
        with log.open("w") as said:
            running.append(subprocess.Popen(program, cwd=ROOT, stdout=said, stderr=said))
        return running[-1], log

    yield start
    for process in running:
        process.kill()
        process.wait()


def rounds(log: Path) -> list[int]:
    """Numbers of the rounds that a log tells of."""
    return [int(number) for number in re.findall(r"^round (\d+) by triton: model", log.read_text(), re.MULTILINE)]


def test_a_signal_in_a_round_leaves_whole_rounds_and_the_next_process_goes_on(
    endpoint: Any, write_config: Make, command: Make, until: Make
) -> None:
    """SIGTERM while an answer is awaited: exit 0, no word of that round in log or record, only whole lines. Started
    again, and killed with SIGINT, it counts on, and no number comes twice."""
    config = write_config(endpoint.port, record={"path": "rounds.jsonl"}, target={"timeout_seconds": 120.0})
    record, answer, held, release = Path(config.record.path), endpoint.answer, threading.Event(), threading.Event()
    third = 7 + 7 + 3  # of the third round, where a round is seven requests

    def hold(images: Any) -> Any:
        if endpoint.requests == third:
            held.set()
            release.wait(120)
        return answer(images)

    endpoint.answer = hold
    process, log = command()
    until(lambda: held.is_set() or process.poll() is not None, 300)
    process.send_signal(signal.SIGTERM)
    release.set()
    assert process.wait(120) == 0, log.read_text()
    assert endpoint.requests == third
    assert rounds(log) == [1, 2]
    assert record.read_bytes().endswith(b"\n")
    entries = [json.loads(line)["round"] for line in record.read_text().splitlines()]
    assert [round_from_json(entry).number for entry in entries] == [1, 2]

    endpoint.answer = answer
    process, log = command()
    until(lambda: len(rounds(log)) >= 2 or process.poll() is not None, 300)
    process.send_signal(signal.SIGINT)
    assert process.wait(120) == 0, log.read_text()
    entries = [json.loads(line)["round"] for line in record.read_text().splitlines()]
    assert [round_from_json(entry).number for entry in entries] == list(range(1, len(entries) + 1))
    assert rounds(log)[0] == 3


def test_one_watch_writes_a_record(endpoint: Any, write_config: Make, command: Make, until: Make) -> None:
    """A second watch on the same record ends with 2 and names the first; a look by hand beside it measures, and leaves
    the record alone, so that no number comes twice."""
    config = write_config(endpoint.port, record={"path": "rounds.jsonl"})
    record = Path(config.record.path)
    first, log = command()
    until(lambda: rounds(log) or first.poll() is not None, 300)
    second, said = command()
    assert second.wait(120) == 2
    assert f"rounds.jsonl: process {first.pid} on " in said.read_text()
    program = [
        Path(sys.executable).with_name("dfmcl"),
        "watch",
        "--config",
        log.with_name("watch.toml"),
        "--rounds",
        "1",
    ]
    by_hand = subprocess.run(program, cwd=ROOT, capture_output=True, text=True, check=False)
    assert by_hand.returncode == 0, by_hand.stderr
    assert "these rounds are not written down" in by_hand.stdout
    first.send_signal(signal.SIGTERM)
    assert first.wait(120) == 0
    numbers = [json.loads(line)["round"]["number"] for line in record.read_text().splitlines()]
    assert numbers == list(range(1, len(numbers) + 1))
    assert not list(record.parent.glob(".*.lock"))
