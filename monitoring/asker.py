"""Questions to an endpoint in a frame: it takes the time, counts, keeps out of users' way, and believes only sense."""

from __future__ import annotations

import statistics
from collections import defaultdict, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import numpy.typing as npt

from dfmcl.common.errors import AnswerError, BadInput, DfmclError, Rejected, Unavailable
from dfmcl.monitoring.results import REASONS, Query
from dfmcl.robustness.data import Bytes
from dfmcl.serving.clients.triton import Answer

# A query is one request. Users wait behind it: one of 16 images moved their 99th percentile at saturation on two cores.
QUERY_IMAGES = 4
REMEMBERED, KNOWN = 64, 8  # latencies of one size: kept, and needed before one is called slow
SLOW_FLOOR_SECONDS = 0.1  # a hiccup of a fast server is no reason to leave it alone
IN_A_ROW = 2

Predict = Callable[[Bytes], Answer]
Logits = npt.NDArray[np.float32]


class Stopped(Exception):
    """The watch was asked to end in the middle of a round, which is then dropped."""


class Paused(Exception):
    """The kill switch is on."""


class Clock(Protocol):
    """The two clocks of the `time` module: unix seconds, and seconds that never jump."""

    def time(self) -> float: ...
    def monotonic(self) -> float: ...


@dataclass
class Latencies:
    """How long requests of each size took lately, over rounds: what is usual here."""

    factor: float = 5.0
    seen: dict[int, deque[float]] = field(default_factory=lambda: defaultdict(lambda: deque(maxlen=REMEMBERED)))

    def forget(self) -> None:
        """A round has given way: what comes next is usual, or a slower model would never be measured."""
        self.seen.clear()

    def is_slow(self, images: int, seconds: float) -> bool:
        """Whether a request took `factor` times as long as is usual for its size; it is remembered either way, so that
        a server that stays slower is usual in the end."""
        known = self.seen[images]
        usual = statistics.median(known) if len(known) >= KNOWN else None
        known.append(seconds)
        return usual is not None and seconds > max(self.factor * usual, SLOW_FLOOR_SECONDS)


@dataclass(frozen=True)
class Manners:
    """How a round keeps out of the way. wait: sleeps, raises Stopped when it is time to end; paused: the kill switch.

    duty: the share of time in which a request of ours may be under way, 0 to 1.
    """

    wait: Callable[[float], None]
    paused: Callable[[], bool]
    duty: float = 1.0
    latencies: Latencies = field(default_factory=Latencies)


class Asker:
    """Asks and counts. version: of the first answer; every later one must be the same."""

    def __init__(self, classes: int, clock: Clock, manners: Manners) -> None:
        self._classes, self._clock, self._manners = classes, clock, manners
        self.queries: list[Query] = []
        self.version = ""
        self._slow, self._rest = 0, 0.0

    def through(self, predict: Predict) -> Callable[[Bytes], Logits]:
        """Asks by `predict`: logits (N, K) of uint8 images (N, H, W, C), N >= 0; DfmclError where any query fails.

        Nothing is retried. Paused or Stopped between two queries, where that is asked for.
        """

        def ask(images: Bytes) -> Logits:
            parts = [images[begin : begin + QUERY_IMAGES] for begin in range(0, len(images), QUERY_IMAGES)]
            none = np.empty((0, self._classes), np.float32)
            return np.concatenate([none, *(self._query(predict, part) for part in parts)])

        return ask

    def _query(self, predict: Predict, images: Bytes) -> Logits:
        self._manners.wait(self._rest)
        if self._manners.paused():
            raise Paused
        begun, reason = self._clock.monotonic(), "internal"
        try:
            answer = predict(images)
            _require_sense(answer, (len(images), self._classes))
            reason = ""
        except DfmclError as error:
            reason = reason_of(error)
            raise
        finally:
            seconds = self._clock.monotonic() - begun
            self._rest = seconds * (1 / self._manners.duty - 1)
            self.queries.append(Query(len(images), seconds, reason))
        if self.version not in ("", answer.version):
            raise Rejected(f"version {self.version} answered first, {answer.version} later", "version_changed")
        self.version = answer.version
        self._slow = self._slow + 1 if self._manners.latencies.is_slow(len(images), seconds) else 0
        if self._slow >= IN_A_ROW:
            self._manners.latencies.forget()
            raise Unavailable(f"{IN_A_ROW} answers in a row took far longer than usual, {seconds:.2f} s", "slow")
        return answer.logits


def _require_sense(answer: Answer, shape: tuple[int, int]) -> None:
    """Refuse what cannot be logits of this model: the version becomes a label, so it must be one of Triton's."""
    if answer.logits.shape != shape or not np.isfinite(answer.logits).all():
        raise Rejected(f"expected finite logits {shape}, received {answer.logits.shape}", "bad_output")
    if not (answer.version.isascii() and answer.version.isdecimal() and len(answer.version) <= 19):
        raise Rejected(f"version {answer.version[:40]!r} is no 64-bit number", "bad_output")


def reason_of(error: DfmclError) -> str:
    """Which of REASONS an error of the client is."""
    if isinstance(error, BadInput):
        return "rejected"  # the endpoint takes other images than ours
    reason = error.reason if isinstance(error, AnswerError) else "unknown"
    reason = {"invalid": "rejected", "unknown_model": "rejected", "internal": "server_error"}.get(reason, reason)
    return reason if reason in REASONS else "internal"
