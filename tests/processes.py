"""Waiting for what another process does, or has."""

from __future__ import annotations

import fcntl
import os
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

TRITON = (8000, 8001, 8002)


def made_once(kept: Path, make: Callable[[Path], object]) -> Path:
    """`kept`, which the first of several processes makes; the others wait for it."""
    kept.parent.mkdir(exist_ok=True)
    with kept.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not kept.exists():
            make(kept)
    return kept


def wait_until(
    condition: Callable[[], Any],
    process: subprocess.Popen[Any] | None = None,
    seconds: float = 120,
    pause: float = 0.01,
) -> None:
    """Until the condition holds; an error once the process, if one is named, has ended, or after so many seconds.

    pause: seconds between two askings, at the least; four times as long as an asking takes, up to a second, so that
    waiting leaves the cores to what is waited for: a page of metrics is dearer than a look at a file.
    """
    deadline = time.monotonic() + seconds
    while True:
        begun = time.monotonic()
        if condition():
            return
        if process is not None:
            assert process.poll() is None, f"{process.args!r} ended with {process.returncode}"
        assert time.monotonic() < deadline, f"nothing after {seconds} s"
        time.sleep(max(pause, min(4 * (time.monotonic() - begun), 1.0)))


@contextmanager
def tritons_own_ports() -> Iterator[None]:
    """For pages whose commands stand there as they are: one test at a time; skips where another program listens."""
    with (Path(tempfile.gettempdir()) / f"dfmcl-tests-ports-{os.getuid()}").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if any(listening(port) for port in TRITON):
            pytest.skip("something listens on Triton's ports 8000 to 8002, which the page's commands use")
        yield


def listening(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0
