"""The Tritons of a gateway together: which one is asked, and which are looked at."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from dfmcl.common.errors import AnswerError, Unavailable
from dfmcl.common.tracing import Told, Tracing
from dfmcl.serving.clients.triton import Contract, Served
from dfmcl.serving.gateway.endpoints import ELSEWHERE, FIRST_PAUSE_SECONDS, Endpoint, Reply, Security, takes


class Pool:
    """Several endpoints as one: round robin over endpoints that answer, with one second chance for a request."""

    def __init__(
        self,
        urls: Sequence[str],
        model: str,
        *,
        security: Security | None = None,
        check_seconds: float = 5.0,
        log: Callable[[dict[str, Any]], None] = lambda entry: None,
        traces: Tracing | None = None,
    ) -> None:
        """log: told of endpoints that come and go."""
        self.endpoints = tuple(Endpoint(url, model, security, traces) for url in urls)
        self.resent = 0  # requests that were sent to a second endpoint
        self._check_seconds, self._log, self._turn = check_seconds, log, 0
        self._tending: list[asyncio.Task[None]] = []
        self._leaving: set[asyncio.Task[None]] = set()  # old connections

    async def __aenter__(self) -> Pool:
        self._tending = [asyncio.create_task(self._tend(endpoint)) for endpoint in self.endpoints]
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for task in (*self._tending, *self._leaving):
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task
        for endpoint in self.endpoints:
            await endpoint.close()

    @property
    def ready(self) -> bool:
        """Whether anyone answers."""
        return any(endpoint.up for endpoint in self.endpoints)

    @property
    def contract(self) -> Contract:
        """What images must look like now; Unavailable where no endpoint has ever answered."""
        for endpoint in sorted(self.endpoints, key=lambda endpoint: not endpoint.up):
            if endpoint.contract is not None:
                return endpoint.contract
        raise Unavailable("no endpoint has answered yet", "unavailable")

    @property
    def served(self) -> Served:
        """The model that is served now; Unavailable as `contract`."""
        for endpoint in sorted(self.endpoints, key=lambda endpoint: not endpoint.up):
            if endpoint.served is not None:
                return endpoint.served
        raise Unavailable("no endpoint has answered yet", "unavailable")

    @property
    def version(self) -> str:
        """Of that model."""
        return self.served.version

    @property
    def computed(self) -> int:
        """Images that were computed, ever."""
        return sum(endpoint.turns.computed for endpoint in self.endpoints)

    @property
    def waiting(self) -> int:
        """Images that wait for their turn at a Triton, or are there."""
        return sum(endpoint.turns.waiting for endpoint in self.endpoints)

    async def infer(
        self,
        images: npt.NDArray[np.uint8],
        *,
        deadline: float,
        flow: str = "",
        canary: bool = False,
        told: Told | None = None,
    ) -> Reply:
        """The reply to images (N, H, W, C) before `deadline`, of time.monotonic(); an AnswerError otherwise.

        A request that its endpoint did not take is sent once more: to another one, or, where there is no other, to the
        same name, which may stand for several servers. Of no images, the reply of the version that is served.
        """
        if not len(images):
            served = self.served
            return Reply(np.empty((0, served.classes), np.float32), served.labels, served.version, "")
        order = self._order(images.shape[1:])
        for endpoint, last in ((order[0], False), (order[1 % len(order)], True)):
            try:
                left = deadline - time.monotonic()
                return await endpoint.infer(images, seconds=left, flow=flow, canary=canary, told=told)
            except AnswerError as error:
                if error.reason not in ("queue_full", "timeout"):
                    endpoint.doubt()
                if last or error.reason not in ELSEWHERE:
                    raise
                self.resent += 1
        raise AssertionError("the second attempt returns or raises")

    def _order(self, shape: tuple[int, ...]) -> list[Endpoint]:
        """All endpoints, first the ones that answer and take such images; of these the least busy one, by turns."""
        self._turn = (self._turn + 1) % len(self.endpoints)
        turned = self.endpoints[self._turn :] + self.endpoints[: self._turn]
        return sorted(
            turned,
            key=lambda endpoint: (
                not (endpoint.up and takes(endpoint, shape)),
                endpoint.turns.waiting / endpoint.turns.parallel,
            ),
        )

    def reconnect(self, security: Security | None, seconds: float) -> None:
        """Show other certificates from now on; what was asked has so many seconds."""
        self._leaving = {task for task in self._leaving if not task.done()}
        self._leaving |= {asyncio.create_task(endpoint.reconnect(security, seconds)) for endpoint in self.endpoints}

    async def _tend(self, endpoint: Endpoint) -> None:
        """For as long as the pool lives: see whether an endpoint answers, with growing pauses while it does not."""
        pause, was_up = FIRST_PAUSE_SECONDS, None
        while True:
            endpoint.doubtful.clear()
            why = None
            try:
                await endpoint.look_up()
                await endpoint.check(self._check_seconds)
            except AnswerError as error:
                why = str(error)
            except Exception as error:  # noqa: BLE001 - an answer that trips us is none, and the next one may not
                endpoint.up, why = False, f"{type(error).__name__}: {error}"
            if endpoint.up is not was_up:
                self._log({"event": "endpoint", "endpoint": endpoint.url, "up": endpoint.up, "why": why})
                was_up = endpoint.up
            if endpoint.up:
                pause = FIRST_PAUSE_SECONDS
                with suppress(TimeoutError):
                    await asyncio.wait_for(endpoint.doubtful.wait(), self._check_seconds)
            else:
                await asyncio.sleep(pause)
                pause = min(2 * pause, self._check_seconds)
