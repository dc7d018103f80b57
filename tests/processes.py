"""Waiting for what another process does."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable
from typing import Any


def wait_until(
    condition: Callable[[], Any], process: subprocess.Popen[Any] | None = None, seconds: float = 120
) -> None:
    """Until the condition holds; an error once the process, if one is named, has ended, or after so many seconds."""
    deadline = time.monotonic() + seconds
    while not condition():
        if process is not None:
            assert process.poll() is None, f"{process.args!r} ended with {process.returncode}"
        assert time.monotonic() < deadline, f"nothing after {seconds} s"
        time.sleep(0.01)  # what is waited for lies in another process's hands: a file, a signal handler
