"""A traffic driver: clients that never stop asking while something is changed, and count what they were answered."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

Ask = Callable[[], tuple[str, npt.NDArray[np.float32]]]


@dataclass
class Traffic:
    """So many clients, each with an `ask` of its own that returns the version and the logits of one request.

    expected: logits by version, compared with every answer. marks: requests that had been answered when something
    was done.
    """

    make: Callable[[], Ask]
    expected: dict[str, npt.NDArray[np.float32]]
    clients: int = 4
    failures: list[str] = field(default_factory=list)
    answers: Counter[str] = field(default_factory=Counter)
    marks: list[tuple[str, int]] = field(default_factory=list)
    stop: threading.Event = field(default_factory=threading.Event)

    def __enter__(self) -> Traffic:
        self.threads = [threading.Thread(target=self._drive) for _ in range(self.clients)]
        for thread in self.threads:
            thread.start()
        self.flow()
        return self

    def __exit__(self, *error: object) -> None:
        self.stop.set()
        for thread in self.threads:
            thread.join(30)

    def flow(self, requests: int = 40, seconds: float = 30) -> None:
        """Wait until so many more requests were answered."""
        wanted, deadline = self.answers.total() + requests, time.monotonic() + seconds
        while self.answers.total() < wanted:
            assert time.monotonic() < deadline, f"no traffic flows: {self.failures[-3:]}"
            time.sleep(0.01)  # other threads ask

    def mark(self, what: str) -> None:
        """Something was done; traffic flows on for a while."""
        self.flow()
        self.marks.append((what, self.answers.total()))

    def _drive(self) -> None:
        ask = self.make()
        while not self.stop.is_set():
            try:
                version, logits = ask()
            except Exception as error:  # noqa: BLE001  # each is a request that a user lost
                self.failures.append(f"after {self.answers.total()} answers: {error}")
                time.sleep(0.05)  # a user tries again
                continue
            if np.abs(logits - self.expected[version]).max() > 1e-3 * np.abs(self.expected[version]).max():
                self.failures.append(f"version {version} answered with the logits of another")
            self.answers[version] += 1
