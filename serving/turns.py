"""Whose turn it is at a Triton, and how many images it gets at a time.

Turns are fair between flows (a flow is a key) by images: start-time fair queueing (Goyal, Vin, Cheng, SIGCOMM 1996).
What is being computed cannot be interrupted, so large requests pass in slices; how large is found by additive increase
and multiplicative decrease against an objective for a slice's time, as Clipper does for batches (Crankshaw et al.,
NSDI 2017, section 4.3). All of it lives in one event loop.
"""

from __future__ import annotations

import asyncio
import heapq
import itertools
import math
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

# A slice's time, in multiples of the least time that one took. With one flow alone, batches that are worth forming;
# with several, so little that who comes second waits for about as long as an answer takes.
ALONE, SHARED = 10.0, 1.5
COMPANY_SECONDS = 60.0  # so long a flow that asked once is expected to ask again
BACK_OFF = 0.9  # Clipper's
FIRST_SLICE = 2.0
MEMORY_SECONDS = 5.0  # of work, over which throughput is averaged


class Turns:
    """The turns at one Triton. most: images of a slice; parallel: slices that it computes at the same time."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.most, self.parallel = 1, 1
        self._clock = clock
        self._waiting: list[tuple[float, int, int, asyncio.Future[None]]] = []  # a heap: start tag, order, images
        self._order, self._virtual, self._finish = itertools.count(), 0.0, dict[str, float]()
        self._in_flight, self._since = 0, clock()
        self._last, self._company_until = ("", -math.inf), -math.inf
        self.forget()

    def forget(self) -> None:
        """Another model is served: what was measured says nothing about it."""
        self._sizes = {ALONE: FIRST_SLICE, SHARED: FIRST_SLICE}
        self._least, self._done, self._busy = math.inf, 0.0, 0.0

    @property
    def slice(self) -> int:
        """So many images go at a time."""
        return max(1, min(int(self._sizes[self._mode]), self.most))

    @property
    def waiting(self) -> int:
        """Images that wait for their turn, or are being computed."""
        return self._in_flight + sum(images for *_, images, _ in self._waiting)

    @property
    def throughput(self) -> float:
        """Images a second, while there was something to do; infinite where nothing was measured yet."""
        return self._done / self._busy if self._done else math.inf

    @property
    def _mode(self) -> float:
        return SHARED if self._clock() < self._company_until else ALONE

    @asynccontextmanager
    async def turn(self, flow: str, images: int, *, weight: float = 1.0, counts: bool = True) -> AsyncIterator[None]:
        """The length of a block in which so many images are computed, `slice` at most.

        weight: of the flow's share; counts: whether its presence makes slices smaller.
        """
        if counts:
            self._meet(flow)
        await self._wait(flow, images, weight)
        self._measure()
        self._in_flight += images
        begun, seconds = self._clock(), math.inf
        try:
            yield
            seconds = self._clock() - begun
            self._done += images
        finally:
            self._measure()
            self._in_flight -= images
            self._adapt(images, seconds)
            self._admit()

    def _meet(self, flow: str) -> None:
        """Remember when two flows were last there within COMPANY_SECONDS of each other."""
        last, seen = self._last
        if flow != last:
            self._company_until = max(self._company_until, seen + COMPANY_SECONDS)
        self._last = flow, self._clock()

    async def _wait(self, flow: str, images: int, weight: float) -> None:
        if not self._waiting and not self._in_flight:
            self._finish.clear()  # nobody is owed anything
        start = max(self._virtual, self._finish.get(flow, 0.0))
        self._finish[flow] = start + images / weight
        if not self._waiting and self._has_room(images):
            self._virtual = start
            return
        place = asyncio.get_running_loop().create_future()
        entry = (start, next(self._order), images, place)
        heapq.heappush(self._waiting, entry)
        try:
            await place
        except asyncio.CancelledError:
            if place.done() and not place.cancelled():  # its turn came at the same moment
                self._in_flight -= images
            else:
                self._waiting.remove(entry)
                heapq.heapify(self._waiting)
            self._admit()
            raise
        self._in_flight -= images  # `turn` counts it

    def _has_room(self, images: int) -> bool:
        return not self._in_flight or self._in_flight + images <= self.slice * self.parallel

    def _admit(self) -> None:
        """Give their turn to those whose it is."""
        while self._waiting and self._has_room(self._waiting[0][2]):
            self._virtual, _, images, place = heapq.heappop(self._waiting)
            self._in_flight += images
            place.set_result(None)

    def _adapt(self, images: int, seconds: float) -> None:
        """Learn from a slice's time, infinite where it failed: by an image or a tenth for each `slice` of images."""
        self._least = min(self._least, seconds)
        mode = self._mode
        size, objective = self._sizes[mode], self._least * mode
        share = min(1.0, images / size)
        if seconds > objective:
            self._sizes[mode] = max(1.0, size * BACK_OFF**share)
        elif self._waiting or images >= self.slice:  # else it says nothing about larger ones
            self._sizes[mode] = min(float(self.most), size + share)

    def _measure(self) -> None:
        """Count the time that has passed as busy where something was computed; old times fade."""
        now = self._clock()
        if self._in_flight:
            passed = now - self._since
            kept = math.exp(-passed / MEMORY_SECONDS)
            self._done, self._busy = self._done * kept, self._busy * kept + passed
        self._since = now
