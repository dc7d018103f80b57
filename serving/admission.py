"""Who comes in: requests are refused before their bodies are read, where their answers would come too late.

The expected wait is Little's law: images before it, over images a second.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from serving.problems import RETRY_SECONDS, Problem

# A flow may hold so many times the places that are free, so that a few always are (dynamic thresholds: Choudhury and
# Hahne, IEEE/ACM Transactions on Networking 6, 1998).
GREED = 8
PATIENCE = 0.5  # of its deadline that a request is expected to wait at most: the expectation is a mean
LONGEST_RETRY_SECONDS = 60


@dataclass
class Place:
    """A request at work. images: as many as its headers promise, then as many as it holds."""

    flow: str
    images: int


class Admission:
    """The requests at work, `places` at most."""

    def __init__(self, places: int) -> None:
        self.places = places
        self._at_work: list[Place] = []

    def __len__(self) -> int:
        return len(self._at_work)

    @contextmanager
    def place(self, flow: str, images: int, *, seconds: float, throughput: float) -> Iterator[Place]:
        """A place for a request of a flow; a Problem where there is none, or the wait would eat its `seconds` up."""
        mine = sum(place.flow == flow for place in self._at_work)
        if mine >= GREED * (self.places - len(self)):
            raise _overloaded("too many requests at work", RETRY_SECONDS)
        excess = self.wait_seconds(flow, images, throughput) - PATIENCE * seconds
        if excess > 0:
            raise _overloaded("the wait would be too long for its deadline", excess)
        place = Place(flow, images)
        self._at_work.append(place)
        try:
            yield place
        finally:
            self._at_work = [other for other in self._at_work if other is not place]

    def wait_seconds(self, flow: str, images: int, throughput: float) -> float:
        """Until its turn comes: behind all of its own flow, and, as turns are fair, as many of every other at most."""
        queued: Counter[str] = Counter()
        for place in self._at_work:
            queued[place.flow] += place.images
        mine = queued.pop(flow, 0)
        ahead = mine + sum(min(others, mine + images) for others in queued.values())
        return ahead / throughput if ahead else 0.0


def _overloaded(why: str, seconds: float) -> Problem:
    retry = max(RETRY_SECONDS, math.ceil(min(seconds, LONGEST_RETRY_SECONDS)))
    return Problem("overloaded", f"{why}; try again later", retry_seconds=retry)
