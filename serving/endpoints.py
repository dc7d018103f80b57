"""The Tritons behind a gateway: who is there, whose turn it is, and where a request goes that met one that is leaving.

All of it lives in one event loop.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt
import tritonclient.grpc.aio as triton
from tritonclient.utils import InferenceServerException

from serving.client import CHANNEL_OPTIONS, Contract, Served, answer_error
from serving.errors import AnswerError, DeadlineExceeded, Unavailable

CANARY_PRIORITY = 2  # of Triton's queue: users are 1 by default
FIRST_PAUSE_SECONDS = 0.1  # before an endpoint that failed is asked again; doubles until check_seconds
CHECK_DEADLINE_SECONDS = 2.0
# Nothing was computed: someone else can be asked. A server that is going says either; one that broke on a request
# says "internal", and would be followed by the next that gets the same request.
ELSEWHERE = frozenset({"unavailable", "unknown_model"})
OPTIONS = [
    *CHANNEL_OPTIONS,
    ("grpc.lb_policy_name", "round_robin"),  # a name may stand for several servers, such as a headless Service
    ("grpc.dns_min_time_between_resolutions_ms", 1000),
]


@dataclass(frozen=True)
class Reply:
    """logits: float32 (N, K); labels: K names; version: of the model; endpoint: who computed it."""

    logits: npt.NDArray[np.float32]
    labels: tuple[str, ...]
    version: str
    endpoint: str


@dataclass(frozen=True)
class Security:
    """TLS towards Triton, by PEM files; "" for what is not used. ca: who is believed, default the system's."""

    ca: str = ""
    certificate: str = ""
    key: str = ""


class Endpoint:
    """One Triton. up: whether it answers; served, contract: what it serves, once it has answered."""

    def __init__(self, url: str, model: str, security: Security | None) -> None:
        self.url, self.up = url, False
        self.served: Served | None = None
        self.contract: Contract | None = None
        self.doubtful = asyncio.Event()  # set where a request found it gone: look at it now
        self._model, self._last_answer = model, float("-inf")
        self._labels: dict[str, tuple[str, ...]] = {}  # by version: one name may stand for servers of two
        self._triton = triton.InferenceServerClient(url, channel_args=OPTIONS, **_tls(security))

    async def infer(self, images: npt.NDArray[np.uint8], *, seconds: float, priority: int = 0) -> Reply:
        """The reply to images (N, H, W, C), N at most the model's max_batch_size, within so many seconds."""
        deadline = time.monotonic() + seconds
        contract, served = self.contract, self.served
        if contract is None or served is None:
            contract, served = await self._describe(seconds)
        response = await self._ask(contract.question(images), seconds=deadline - time.monotonic(), priority=priority)
        logits, version = contract.logits(response, len(images)), response.get_response().model_version
        if version not in self._labels:  # another model came up there, with other labels perhaps
            _, served = await self._describe(deadline - time.monotonic())
        self.up, self._last_answer = True, time.monotonic()
        return Reply(logits, self._labels.get(version, served.labels), version, self.url)

    async def check(self, idle_seconds: float) -> None:
        """Prove by an inference that it answers, unless it has answered someone within idle_seconds; sets `up`."""
        begun = time.monotonic()
        if self.up and self._last_answer > begun - idle_seconds:
            return
        try:
            await self._describe(CHECK_DEADLINE_SECONDS)
        except AnswerError as error:
            # A full queue is a busy server, and so is one that answers others while this waits.
            if error.reason == "queue_full" or (self._last_answer >= begun and error.reason == "timeout"):
                return
            self.up = False
            raise

    def doubt(self) -> None:
        """Take it out, and have it looked at."""
        self.up = False
        self.doubtful.set()

    async def close(self) -> None:
        """Close the connection."""
        await self._triton.close()

    async def _describe(self, seconds: float) -> tuple[Contract, Served]:
        """What it serves now, from its configuration and an inference of one black image; sets `up`."""
        deadline = time.monotonic() + seconds
        where = f"model {self._model!r} at {self.url}"
        config = await _answered(
            lambda left: self._triton.get_model_config(self._model, client_timeout=left), where, seconds
        )
        contract = Contract.of(config.config, where)
        black = np.zeros((1, *contract.input_shape), np.uint8)
        response = await self._ask(contract.question(black, ranked=True), seconds=deadline - time.monotonic())
        version = response.get_response().model_version
        labels = contract.labels(response)
        self.contract = contract
        self.served = Served(self._model, version, contract.input_shape, contract.classes, labels)
        self._labels[version] = labels
        self.up, self._last_answer = True, time.monotonic()
        return self.contract, self.served

    async def _ask(self, question: dict[str, Any], *, seconds: float, priority: int = 0) -> Any:
        where = f"model {self._model!r} at {self.url}"
        return await _answered(
            lambda left: self._triton.infer(
                self._model,
                **question,
                priority=priority,
                timeout=int(left * 1e6),  # in the queue, so that nobody computes for a client that left
                client_timeout=left,
            ),
            where,
            seconds,
        )


class Pool:
    """Several endpoints as one: round robin over those that answer, with one second chance for a request."""

    def __init__(
        self,
        urls: Sequence[str],
        model: str,
        *,
        security: Security | None = None,
        check_seconds: float = 5.0,
        log: Callable[[dict[str, Any]], None] = lambda entry: None,
    ) -> None:
        """log: told of endpoints that come and go."""
        self.endpoints = tuple(Endpoint(url, model, security) for url in urls)
        self.resent = 0  # requests that were sent to a second endpoint
        self._check_seconds, self._log, self._turn = check_seconds, log, 0
        self._tending: list[asyncio.Task[None]] = []

    async def __aenter__(self) -> Pool:
        self._tending = [asyncio.create_task(self._tend(endpoint)) for endpoint in self.endpoints]
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for task in self._tending:
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

    async def infer(self, images: npt.NDArray[np.uint8], *, deadline: float, priority: int = 0) -> Reply:
        """The reply to images (N, H, W, C) before `deadline`, of time.monotonic(); an AnswerError otherwise.

        A request that its endpoint did not take is sent once more: to another one, or, where there is no other, to the
        same name, which may stand for several servers.
        """
        order = self._order(images.shape[1:])
        for endpoint, last in ((order[0], False), (order[1 % len(order)], True)):
            try:
                return await endpoint.infer(images, seconds=deadline - time.monotonic(), priority=priority)
            except AnswerError as error:
                if error.reason not in ("queue_full", "timeout"):
                    endpoint.doubt()
                if last or error.reason not in ELSEWHERE:
                    raise
                self.resent += 1
        raise AssertionError("the second attempt returns or raises")

    def _order(self, shape: tuple[int, ...]) -> list[Endpoint]:
        """All endpoints, the one whose turn it is first, those that do not answer, or take other images, last."""
        self._turn = (self._turn + 1) % len(self.endpoints)
        turned = self.endpoints[self._turn :] + self.endpoints[: self._turn]
        return sorted(turned, key=lambda endpoint: not (endpoint.up and _takes(endpoint, shape)))

    async def _tend(self, endpoint: Endpoint) -> None:
        """For as long as the pool lives: see whether an endpoint answers, with growing pauses while it does not."""
        pause, was_up = FIRST_PAUSE_SECONDS, None
        while True:
            endpoint.doubtful.clear()
            why = None
            try:
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


def _takes(endpoint: Endpoint, shape: tuple[int, ...]) -> bool:
    return endpoint.contract is not None and endpoint.contract.input_shape == shape


def _tls(security: Security | None) -> dict[str, Any]:
    if security is None:
        return {}
    return {
        "ssl": True,
        "root_certificates": security.ca or None,
        "private_key": security.key or None,
        "certificate_chain": security.certificate or None,
    }


async def _answered(call: Callable[[float], Awaitable[Any]], where: str, seconds: float) -> Any:
    """What a call with so many seconds left returns; an AnswerError where it fails, or there is no time left for it."""
    if seconds <= 0:
        raise DeadlineExceeded(f"{where}: no time is left to ask", "timeout")
    try:
        return await call(seconds)
    except InferenceServerException as error:
        raise answer_error(error, where, seconds) from None
