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
PATIENCE = 0.7  # of its deadline in which an answer has to be expected: the expectation is a mean
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
        """A place for a request of a flow; a Problem where there is none, or its answer would take too long.

        seconds: until its deadline; throughput: images a second.
        """
        mine = sum(place.flow == flow for place in self._at_work)
        if mine >= GREED * (self.places - len(self)):
            raise _overloaded("too many requests at work", RETRY_SECONDS)
        ahead = self.ahead(flow, images)
        excess = (ahead + images) / throughput - PATIENCE * seconds
        if ahead and excess > 0:  # alone it may try: nothing is known of how long such a request takes
            raise _overloaded("too many images wait", excess)
        place = Place(flow, images)
        self._at_work.append(place)
        try:
            yield place
        finally:
            self._at_work = [other for other in self._at_work if other is not place]

    def ahead(self, flow: str, images: int) -> int:
        """Images before the last of so many: all of its own flow, and, as turns are fair, no more of any other."""
        queued: Counter[str] = Counter()
        for place in self._at_work:
            queued[place.flow] += place.images
        mine = queued.pop(flow, 0)
        return mine + sum(min(others, mine + images) for others in queued.values())


def _overloaded(why: str, seconds: float) -> Problem:
    retry = max(RETRY_SECONDS, math.ceil(min(seconds, LONGEST_RETRY_SECONDS)))
    return Problem("overloaded", f"{why}; try again later", retry_seconds=retry)
