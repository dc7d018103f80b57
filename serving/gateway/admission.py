"""Who comes in: requests are refused before their bodies are read, where their answers would come too late.

The expected time is Little's law: images before it and its own, over images a second, as they were measured here, with
whatever is slow: Triton, a decoder, this process. Refusals are paced, or asking again at once would be a load itself.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from dfmcl.serving.gateway.problems import RETRY_SECONDS, Problem

# A flow may hold so many times the places that are free, so that a few always are (dynamic thresholds: Choudhury and
# Hahne, IEEE/ACM Transactions on Networking 6, 1998).
GREED = 8
PATIENCE = 0.5  # of its deadline in which an answer has to be expected: the expectation is a mean
LONGEST_RETRY_SECONDS = 60
MEMORY_SECONDS = 5.0  # of work, over which images a second are averaged
# Of work, before which nothing is known: the first answers of a cold server are slow, and a few were counted as all.
LEARNING_SECONDS = 3.0
# Of refusals: one costs this process about half a millisecond, and as much for each so many bytes that are thrown away.
PER_SECOND, PER_BYTES, LONGEST_PAUSE = 200, 65_536, 1.0


@dataclass(eq=False)
class Place:
    """A request at work. images: as many as its headers promise, then as many as it holds."""

    flow: str
    images: int
    whole: bool = False  # its body is there: from now on it is not waited for


class Admission:
    """The requests at work, `places` at most."""

    def __init__(self, places: int, computed: Callable[[], int], clock: Callable[[], float] = time.monotonic) -> None:
        """computed: images that were computed, ever."""
        self._places, self._computed, self._clock = places, computed, clock
        self._at_work: list[Place] = []
        self._done, self._busy = 0.0, 0.0
        self._seen, self._next_refusal = (clock(), computed()), clock()

    def __len__(self) -> int:
        return len(self._at_work)

    @property
    def throughput(self) -> float:
        """Images a second, while there was something to do; infinite where too little was measured yet."""
        self._measure()
        return self._done / self._busy if self._done and self._busy >= LEARNING_SECONDS else math.inf

    @contextmanager
    def place(self, flow: str, images: int, seconds: float) -> Iterator[Place]:
        """A place for a request of a flow, with so many seconds until its deadline; a Problem where there is none, or
        its answer would take too long."""
        mine = sum(place.flow == flow for place in self._at_work)
        if mine >= GREED * (self._places - len(self)):
            raise _overloaded("too many requests at work", RETRY_SECONDS)
        ahead = self.ahead(flow, images)
        excess = (ahead + images) / self.throughput - PATIENCE * seconds
        if ahead and excess > 0:  # alone it may try: nothing is known of how long such a request takes
            raise _overloaded("too many images wait", excess)
        place = Place(flow, images)
        self._at_work.append(place)
        try:
            yield place
        finally:
            self._measure()
            self._at_work.remove(place)

    def arrived(self, place: Place, images: int) -> None:
        """Its body is there, and holds so many images."""
        self._measure()
        place.whole, place.images = True, images

    def ahead(self, flow: str, images: int) -> int:
        """Images before the last of so many: all of its own flow, and, as turns are fair, no more of any other."""
        queued: Counter[str] = Counter()
        for place in self._at_work:
            queued[place.flow] += place.images
        mine = queued.pop(flow, 0)
        return mine + sum(min(others, mine + images) for others in queued.values())

    def pause(self, unread: int) -> float:
        """Seconds to wait before the next refusal is sent. unread: bytes of a body that nobody will look at."""
        now = self._clock()
        cost = (1 + unread / PER_BYTES) / PER_SECOND
        self._next_refusal = min(max(now, self._next_refusal) + cost, now + LONGEST_PAUSE)
        return self._next_refusal - now

    def _measure(self) -> None:
        """Count what was computed since the last look, and the time as busy where something was whole; both fade."""
        (before, had), now, has = self._seen, self._clock(), self._computed()
        if any(place.whole for place in self._at_work):
            kept = math.exp((before - now) / MEMORY_SECONDS)
            self._done, self._busy = self._done * kept + has - had, self._busy * kept + now - before
        self._seen = now, has


def _overloaded(why: str, seconds: float) -> Problem:
    retry = max(RETRY_SECONDS, math.ceil(min(seconds, LONGEST_RETRY_SECONDS)))
    return Problem("overloaded", f"{why}; try again later", retry_seconds=retry)
