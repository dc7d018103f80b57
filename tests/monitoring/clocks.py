"""Clocks that tests set, and waiting by the real one."""

from __future__ import annotations

import threading
from collections.abc import Callable


def wait_for(condition: Callable[[], bool], seconds: float = 30.0) -> None:
    """Wait until a condition holds, or fail."""
    pause = threading.Event()
    for _ in range(int(seconds / 0.02)):
        if condition():
            return
        pause.wait(0.02)
    raise AssertionError(f"did not come true within {seconds:g} s")


class Still:
    """A clock that stands where it is put. time: unix seconds; monotonic: since it was made."""

    def __init__(self, now: float = 0.0) -> None:
        self.now = now

    def time(self) -> float:
        return 1000.0 + self.now

    def monotonic(self) -> float:
        return self.now


class Ticking(Still):
    """A clock that counts a second a look."""

    def monotonic(self) -> float:
        self.now += 1.0
        return self.now
