"""Whose turn it is at a Triton, and how many images it gets at a time.

Turns are fair between flows (a flow is a key) by images: start-time fair queueing (Goyal, Vin, Cheng, SIGCOMM 1996);
within a flow, first come, first served. What is being computed cannot be interrupted, so large requests pass in slices.
How large is found by additive increase and multiplicative decrease against an objective for a slice's time, as Clipper
does for batches (Crankshaw et al., NSDI 2017, section 4.3). All of it lives in one event loop.
"""

from __future__ import annotations

import asyncio
import functools
import math
import time
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any

# A slice's time, in multiples of the least time that one took. With one flow alone, batches that are worth forming;
# with several, so little that who comes second waits for about as long as an answer takes.
ALONE, SHARED = 10.0, 1.2
COMPANY_SECONDS = 60.0  # so long a flow that asked once is expected to ask again
BACK_OFF = 0.9  # Clipper's
FIRST_SLICE = 2.0
# A size that took too long at so many tries, hiccups aside, is tried again after so many slices. Clipper tries a little
# more than what was quick enough; two images take twice as long as one, and without this pause five of seven slices
# were of two.
TRIES, TRY_AGAIN = 3, 200

Ask = Callable[[int, int], Coroutine[Any, Any, Any]]


@dataclass(eq=False)
class _Job:
    """A request on its way through. given: images that had their turn; parts: what came of each, by its first image."""

    flow: str
    weight: float
    images: int
    ask: Ask
    done: asyncio.Future[None]
    given: int = 0
    running: set[asyncio.Task[Any]] = field(default_factory=set)
    parts: dict[int, Any] = field(default_factory=dict)

    @property
    def left(self) -> int:
        """Images that wait for their turn."""
        return self.images - self.given

    @property
    def wants(self) -> bool:
        """Whether it can use a turn now. Its first slice goes alone: the others must be of the same version."""
        return self.left > 0 and (self.given == 0 or bool(self.parts))


class Turns:
    """The turns at one Triton. most: images of a slice; parallel: slices that it computes at the same time."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.most, self.parallel = 1, 1
        self.computed = 0  # images, ever
        self._clock, self._in_flight = clock, 0
        self._jobs: dict[str, list[_Job]] = {}  # by flow
        # Virtual time: of the slice that went last, of each flow's next slice, and where its last one ended.
        self._virtual, self._start, self._finish = 0.0, dict[str, float](), dict[str, float]()
        self._last, self._company_until = ("", -math.inf), -math.inf
        self.forget()

    def forget(self) -> None:
        """Another model is served: what was measured says nothing about it."""
        self._sizes = {ALONE: FIRST_SLICE, SHARED: FIRST_SLICE}
        self._least = math.inf
        self._tried = dict[int, tuple[int, float]]()  # by a slice's images: how often, and the least time that it took
        self._held = 0  # slices since a larger size was last tried

    @property
    def slice(self) -> int:
        """So many images go at a time."""
        return max(1, min(int(self._sizes[self._mode]), self.most))

    @property
    def waiting(self) -> int:
        """Images that wait for their turn, or are being computed."""
        return self._in_flight + sum(job.left for jobs in self._jobs.values() for job in jobs)

    async def all(self, flow: str, images: int, ask: Ask, *, weight: float = 1.0, counts: bool = True) -> list[Any]:
        """What `ask(begin, end)` returns for each slice of so many images, in order; its first error where it fails.

        weight: of the flow's share; counts: whether its presence makes slices smaller.
        """
        if counts:
            self._meet(flow)
        job = _Job(flow, weight, images, ask, asyncio.get_running_loop().create_future())
        if flow not in self._jobs:
            self._start[flow] = max(self._virtual, self._finish.get(flow, 0.0))
        self._jobs.setdefault(flow, []).append(job)
        self._give()
        try:
            await job.done
        finally:
            self._drop(job)
        return [job.parts[begin] for begin in sorted(job.parts)]

    def _meet(self, flow: str) -> None:
        """Remember when two flows were last there within COMPANY_SECONDS of each other."""
        last, seen = self._last
        if flow != last:
            self._company_until = max(self._company_until, seen + COMPANY_SECONDS)
        self._last = flow, self._clock()

    @property
    def _mode(self) -> float:
        return SHARED if self._clock() < self._company_until else ALONE

    def _give(self) -> None:
        """Give their turn to those whose it is, for as long as there is room."""
        while ready := {flow: job for flow, jobs in self._jobs.items() if (job := _first(jobs))}:
            flow = min(ready, key=self._start.__getitem__)
            job = ready[flow]
            images = min(self.slice, job.left)
            if self._in_flight and self._in_flight + images > self.slice * self.parallel:
                return
            self._virtual = self._start[flow]
            self._start[flow] = self._finish[flow] = self._virtual + images / job.weight
            self._in_flight += images
            task = asyncio.create_task(job.ask(job.given, job.given + images))
            # Not in the coroutine: one that is cancelled before its first step has no end.
            task.add_done_callback(functools.partial(self._ended, job, job.given, images, self._clock()))
            job.given += images
            job.running.add(task)

    def _ended(self, job: _Job, begin: int, images: int, begun: float, task: asyncio.Task[Any]) -> None:
        seconds, error = self._clock() - begun, None if task.cancelled() else task.exception()
        failed = task.cancelled() or error is not None
        self._in_flight -= images
        self.computed += 0 if failed else images
        self._adapt(images, math.inf if failed else seconds)
        job.running.discard(task)
        if not failed:
            job.parts[begin] = task.result()
        if not job.done.done():
            if error is not None:
                job.done.set_exception(error)
            elif not job.left and not job.running:
                job.done.set_result(None)
        self._give()

    def _drop(self, job: _Job) -> None:
        """It is over: answered, failed, or nobody waits for it any more."""
        self._jobs[job.flow].remove(job)
        if not self._jobs[job.flow]:
            del self._jobs[job.flow], self._start[job.flow]
        for task in job.running:
            task.cancel()
        if not self._jobs:
            self._finish.clear()  # nobody is owed anything
        self._give()

    def _adapt(self, images: int, seconds: float) -> None:
        """Learn from a slice's time, infinite where it failed: by an image or a tenth for each `slice` of images."""
        tries, least = self._tried.get(images, (0, math.inf))
        self._tried[images] = tries + 1, min(least, seconds)
        self._least = min(self._least, seconds)
        mode = self._mode
        size, objective = self._sizes[mode], self._least * mode
        share = min(1.0, images / size)
        if seconds > objective or math.isinf(seconds):
            self._sizes[mode] = max(1.0, size * BACK_OFF**share)
        elif images >= self.slice or any(map(_first, self._jobs.values())):  # else it tells nothing of larger ones
            self._sizes[mode] = self._grown(size, share, objective)

    def _grown(self, size: float, share: float, objective: float) -> float:
        """A size after a slice that was quick enough; no larger slices yet where those took too long every time."""
        grown, larger = min(float(self.most), size + share), int(size) + 1
        tries, least = self._tried.get(larger, (0, 0.0))
        if grown < larger or tries < TRIES or least <= objective:
            return grown
        self._held += 1
        if self._held < TRY_AGAIN:
            return size
        self._held = 0
        return float(larger)


def _first(jobs: list[_Job]) -> _Job | None:
    return next((job for job in jobs if job.wants), None)
