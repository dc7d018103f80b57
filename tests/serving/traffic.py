"""Traffic drivers: clients that never stop asking while something is changed, and count what they were answered.

As a program a crowd of clients, in a process of its own: its computing is not taken from the measuring process.
"""

from __future__ import annotations

import http.client
import json
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

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


@dataclass(frozen=True)
class Crowd:
    """So many clients of a gateway with one key, each with a batch of so many images of a shape, again and again.

    patience: of the seconds that a refusal names, the share that they wait. timeout_ms: of each request.
    """

    url: str
    key: str
    clients: int
    images: int
    shape: tuple[int, int, int]
    timeout_ms: int = 10_000
    patience: float = 1.0

    @contextmanager
    def asking(self) -> Iterator[Counted]:
        """For the length of a block; what they were answered meanwhile is there afterwards."""
        command = [sys.executable, "-m", "tests.serving.traffic", json.dumps(asdict(self))]
        process = subprocess.Popen(
            command, cwd=Path(__file__).parents[2], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        counted = Counted()
        assert process.stdout is not None
        assert process.stdout.readline() == "asking\n"
        try:
            yield counted
        finally:
            said, _ = process.communicate("stop\n", timeout=60)
            told = json.loads(said)
            counted.statuses, counted.seconds = {int(key): value for key, value in told[0].items()}, told[1]
            counted.images_per_second = counted.statuses.get(200, 0) * self.images / counted.seconds


@dataclass
class Counted:
    """Answers by status, 0 where there was none, of a crowd in so many seconds."""

    statuses: dict[int, int] = field(default_factory=dict)
    seconds: float = 0.0
    images_per_second: float = 0.0


def tensor(images: npt.NDArray[np.uint8]) -> bytes:
    """A KServe v2 request."""
    entry = {"name": "images", "shape": images.shape, "datatype": "UINT8", "data": images.ravel().tolist()}
    return json.dumps({"inputs": [entry]}).encode()


def main() -> None:
    """Be a crowd until a line comes; print what it was answered."""
    crowd = Crowd(**json.loads(sys.argv[1]))
    body = tensor(np.random.default_rng(0).integers(0, 256, (crowd.images, *crowd.shape), np.uint8))
    headers = {
        "X-API-Key": crowd.key,
        "Content-Type": "application/json",
        "X-Request-Timeout-Ms": str(crowd.timeout_ms),
    }
    stop, statuses = threading.Event(), Counter[int]()

    def ask() -> None:
        connection = http.client.HTTPConnection(urlsplit(crowd.url).netloc, timeout=30)
        while not stop.is_set():
            status, again = 0, "0"
            with suppress(OSError, http.client.HTTPException):
                connection.request("POST", "/v1/classify", body, headers)
                response = connection.getresponse()
                response.read()
                status, again = response.status, response.headers.get("Retry-After", "0")
            if not stop.is_set():
                statuses[status] += 1
            stop.wait(crowd.patience * float(again))

    for _ in range(crowd.clients):
        threading.Thread(target=ask, daemon=True).start()  # daemons: nobody waits for their last answers
    begun = time.monotonic()
    print("asking", flush=True)
    sys.stdin.readline()
    stop.set()
    print(json.dumps([statuses, time.monotonic() - begun]), flush=True)


if __name__ == "__main__":
    main()
