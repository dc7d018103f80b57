"""Whether a served model lives: a question of our own, and Triton's count of the answers that others get meanwhile.

A place at the end of a long queue is no death: under a flood our question waits longer than its deadline, as
everybody's does, while answers go out all the time. A model is dead where three questions in a row failed and nobody
else was answered either.
"""

from __future__ import annotations

import http.client
import re
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager

import numpy as np
import numpy.typing as npt

from dfmcl.common.errors import AnswerError, Broken
from dfmcl.serving.triton.process import HOST, Server, last_meaningful_line

FAILURES = 3  # in a row
METRICS_SECONDS = 2.0  # a listener and a thread of their own, which no flood of inferences reaches
ANSWERED = re.compile(r"^nv_inference_request_success\{([^}]*)\} (\d+)$", re.MULTILINE)


class Pulse:
    """The liveness of one model. image: (1, H, W, C) that it can be asked; seconds: between a good answer and the next
    question; after a bad one the next is asked at once."""

    def __init__(self, server: Server, model: str, image: npt.NDArray[np.uint8], seconds: float) -> None:
        self.image = image
        self._server, self._model, self._seconds = server, model, seconds
        self._failures, self._due = 0, time.monotonic() + seconds
        self._asked: Future[AnswerError | None] | None = None

    def look(self, askers: ThreadPoolExecutor) -> None:
        """Ask where it is time to, without waiting for the answer; Broken where too many failed in a row."""
        if self._asked is None and time.monotonic() >= self._due:
            self._asked = askers.submit(silence, self._server, self._model, self.image)
        if self._asked is None or not self._asked.done():
            return
        error, self._asked = self._asked.result(), None
        self._failures = 0 if error is None else self._failures + 1
        self._due = time.monotonic() + (self._seconds if error is None else 0.0)
        if self._failures >= FAILURES:
            last = last_meaningful_line(self._server.log)
            raise Broken(f"{error}; {FAILURES} times in a row, and nobody else was answered; its log: {last}")


@contextmanager
def asking() -> Iterator[ThreadPoolExecutor]:
    """Threads for the questions of pulses. In the end nobody waits for threads that still hang: their server goes."""
    askers = ThreadPoolExecutor(32, "pulse")
    try:
        yield askers
    finally:
        askers.shutdown(wait=False, cancel_futures=True)


def silence(server: Server, model: str, image: npt.NDArray[np.uint8]) -> AnswerError | None:
    """Why our question was not answered; None where it was, or where others were meanwhile."""
    before = answered(server.ports["metrics"], model)
    try:
        with server.client(model) as client:
            client.predict(image)
    except AnswerError as error:
        # An answer that is none counts as one there.
        lives = error.reason != "bad_output" and _grew(before, answered(server.ports["metrics"], model))
        return None if lives else error
    return None


def answered(port: int, model: str) -> dict[str, int] | None:
    """How many requests Triton has answered since it loaded each version of a model, by the metric's labels; None where
    its metrics cannot be read."""
    connection = http.client.HTTPConnection(HOST, port, timeout=METRICS_SECONDS)
    try:
        connection.request("GET", "/metrics")
        text = connection.getresponse().read().decode()
    except (OSError, ValueError, http.client.HTTPException):
        return None
    finally:
        connection.close()
    return {labels: int(count) for labels, count in ANSWERED.findall(text) if f'model="{model}"' in labels}


def _grew(before: dict[str, int] | None, after: dict[str, int] | None) -> bool:
    """Whether any count did; what cannot be read proves nothing."""
    if before is None or after is None:
        return False
    return any(count > before.get(labels, 0) for labels, count in after.items())
