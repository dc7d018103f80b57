"""The Tritons behind a gateway: who is there, whose turn it is, and where a request goes that met one that is leaving.

All of it lives in one event loop.
"""

from __future__ import annotations

import asyncio
import ipaddress
import socket
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import tritonclient.grpc.aio as triton
from tritonclient.utils import InferenceServerException

from dfmcl.common.errors import AnswerError, DeadlineExceeded, Rejected
from dfmcl.common.tracing import Told, Tracing
from dfmcl.serving.clients.triton import CHANNEL_OPTIONS, Contract, Served, answer_error
from dfmcl.serving.gateway.turns import Turns

CANARY_PRIORITY = 2  # of Triton's queue: users are 1 by default
CANARY_WEIGHT = 0.1  # of a user's share, where several wait for their turns here
FIRST_PAUSE_SECONDS = 0.1  # before an endpoint that failed is asked again; doubles until check_seconds
CHECK_DEADLINE_SECONDS = 2.0  # for a sign of life, which waits in no queue
PATIENCE_SECONDS = 60.0  # for an inference, which waits behind all that others sent there
LOOK_UP_SECONDS = 1.0  # for the addresses of a name
# A rollout behind one name: so often a slice is asked of the version that computed the first one, before all of them
# are asked of another, and so often that.
SAME_VERSION, OTHER_VERSION = 4, 3
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
    """One Triton. up: whether it answers; served, contract: of its model, once it has answered."""

    def __init__(self, url: str, model: str, security: Security | None, traces: Tracing | None = None) -> None:
        self.url, self.up, self._traces = url, False, traces
        self.served: Served | None = None
        self.contract: Contract | None = None
        self.doubtful = asyncio.Event()  # set where a request found it gone: look at it now
        self.turns = Turns()
        self._model, self._last_answer = model, float("-inf")
        self._instances, self._addresses = 1, 1
        self._labels: dict[str, tuple[str, ...]] = {}  # by version: one name may stand for servers of two
        self._triton = _connection(url, security)

    async def infer(
        self,
        images: npt.NDArray[np.uint8],
        *,
        seconds: float,
        flow: str = "",
        canary: bool = False,
        told: Told | None = None,
    ) -> Reply:
        """The reply to images (N, H, W, C), N at most the model's max_batch_size, within so many seconds.

        All of it comes from one version. flow: whose they are; turns are fair between flows. told: the span of the
        request, of which those of its slices are parts.
        """
        deadline = time.monotonic() + seconds
        if self.contract is None:
            await self._describe(seconds)
        for _ in range(OTHER_VERSION):
            logits, version = await self._whole(images, deadline, flow, canary, told)
            if version is not None:
                break
        else:
            raise Rejected(f"model {self._model!r} at {self.url}: its version changes too often", "version_changed")
        if version not in self._labels:  # another model came up there, with other labels perhaps
            self.turns.forget()
            await self._describe(deadline - time.monotonic())
        assert self.served is not None
        return Reply(logits, self._labels.get(version, self.served.labels), version, self.url)

    async def _whole(
        self, images: npt.NDArray[np.uint8], deadline: float, flow: str, canary: bool, told: Told | None
    ) -> tuple[npt.NDArray[np.float32], str | None]:
        """Logits of all images, slice by slice, and the version that computed them; None where there were several."""
        version: str | None = None

        async def ask(begin: int, end: int) -> npt.NDArray[np.float32]:
            nonlocal version
            part, asked = images[begin:end], version or ""
            if told is None or self._traces is None:
                logits, version = await self._slice(part, deadline, canary, asked)
                return logits
            with self._traces.span("triton.infer", "client", told.context, server__address=self.url) as own:
                own.note(dfmcl__images=len(part), dfmcl__model=self._model)
                logits, version = await self._slice(part, deadline, canary, asked, own.headers)
                own.note(dfmcl__version=version)
            return logits

        weight = CANARY_WEIGHT if canary else 1.0
        try:
            parts = await self.turns.all(flow, len(images), ask, weight=weight, counts=not canary)
        except AnswerError as error:
            if version is None or error.reason != "unknown_model":
                raise
            return np.empty((0, 0), np.float32), None
        return np.concatenate(parts), version

    async def _slice(
        self,
        images: npt.NDArray[np.uint8],
        deadline: float,
        canary: bool,
        version: str,
        headers: Mapping[str, str] | None = None,
    ) -> tuple[npt.NDArray[np.float32], str]:
        """Logits of so many images as go at a time, and the version that computed them; version: "" for any.

        headers: the trace context.
        """
        assert self.contract is not None
        contract, question = self.contract, self.contract.question(images)
        for last in (*[False] * (SAME_VERSION - 1 if version else 0), True):
            try:
                response = await self._ask(
                    question,
                    seconds=deadline - time.monotonic(),
                    priority=CANARY_PRIORITY if canary else 0,
                    version=version,
                    headers=headers,
                )
                break
            except AnswerError as error:
                if last or error.reason != "unknown_model":
                    raise
        logits = contract.logits(response, len(images))
        self.up, self._last_answer = True, time.monotonic()
        return logits, response.get_response().model_version

    async def check(self, idle_seconds: float) -> None:
        """Prove by an inference that it answers, unless it has answered someone within idle_seconds; sets `up`.

        The inference may wait in a long queue: until it is answered, signs of life, which wait nowhere, are enough.
        """
        begun = time.monotonic()
        if self.up and self._last_answer > begun - idle_seconds:
            return
        probe = asyncio.ensure_future(self._describe(PATIENCE_SECONDS))
        try:
            while not probe.done() and not (self.up and self._last_answer >= begun):
                await self._require_life()
                await asyncio.wait({probe}, timeout=CHECK_DEADLINE_SECONDS)
            if probe.done():
                probe.result()
        except AnswerError as error:
            if error.reason == "queue_full":  # a busy server
                return
            self.up = False
            raise
        finally:
            probe.cancel()
            await asyncio.gather(probe, return_exceptions=True)

    async def look_up(self) -> None:
        """Count the servers that its name stands for: they compute at the same time."""
        host, _, port = self.url.rpartition(":")
        with suppress(OSError, TimeoutError):
            async with asyncio.timeout(LOOK_UP_SECONDS):
                self._addresses = await _addresses(host.strip("[]"), int(port))
        self.turns.parallel = self._instances * self._addresses

    async def _require_life(self) -> None:
        """An AnswerError where the server says nothing at all; that it does not know the question is an answer."""
        where = f"model {self._model!r} at {self.url}"
        try:
            await _answered(
                lambda left: self._triton.is_server_live(client_timeout=left), where, CHECK_DEADLINE_SECONDS
            )
        except Rejected:
            return

    def doubt(self) -> None:
        """Take it out, and have it looked at."""
        self.up = False
        self.doubtful.set()

    async def close(self) -> None:
        """Close the connection."""
        await self._triton.close()

    async def reconnect(self, security: Security | None, seconds: float) -> None:
        """Ask over a new connection from now on; what was asked over the old one has so many seconds."""
        old, self._triton = self._triton, _connection(self.url, security)
        self.doubtful.set()
        await asyncio.sleep(seconds)
        await old.close()

    async def _describe(self, seconds: float) -> tuple[Contract, Served]:
        """Its model now, from its configuration and an inference of one black image; sets `up`."""
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
        self._instances = _instances(config.config)
        self.turns.most, self.turns.parallel = contract.max_batch_size, self._instances * self._addresses
        self._labels[version] = labels
        self.up, self._last_answer = True, time.monotonic()
        return self.contract, self.served

    async def _ask(
        self,
        question: dict[str, Any],
        *,
        seconds: float,
        priority: int = 0,
        version: str = "",
        headers: Mapping[str, str] | None = None,
    ) -> Any:
        where = f"model {self._model!r} at {self.url}"
        return await _answered(
            lambda left: self._triton.infer(
                self._model,
                **question,
                model_version=version,
                priority=priority,
                timeout=int(left * 1e6),  # in the queue, so that nobody computes for a client that left
                client_timeout=left,
                headers=headers,
            ),
            where,
            seconds,
        )


def takes(endpoint: Endpoint, shape: tuple[int, ...]) -> bool:
    return endpoint.contract is not None and endpoint.contract.input_shape == shape


def _connection(url: str, security: Security | None) -> Any:
    if security is None:
        return triton.InferenceServerClient(url, channel_args=OPTIONS)
    return triton.InferenceServerClient(
        url,
        channel_args=OPTIONS,
        ssl=True,
        root_certificates=security.ca or None,
        private_key=security.key or None,
        certificate_chain=security.certificate or None,
    )


def _instances(config: Any) -> int:
    """How many slices one server computes at the same time, from Triton's ModelConfig."""
    return max(1, sum(max(1, int(group.count)) * max(1, len(group.gpus)) for group in config.instance_group))


async def _addresses(host: str, port: int) -> int:
    """How many servers a name stands for: a server may have an address of each family."""
    with suppress(ValueError):
        ipaddress.ip_address(host)
        return 1
    found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return max(Counter(family for family, *_ in set(found)).values())


async def _answered(call: Callable[[float], Awaitable[Any]], where: str, seconds: float) -> Any:
    """What a call with so many seconds left returns; an AnswerError where it fails, or there is no time left for it."""
    if seconds <= 0:
        raise DeadlineExceeded(f"{where}: no time is left to ask", "timeout")
    try:
        return await call(seconds)
    except InferenceServerException as error:
        raise answer_error(error, where, seconds) from None
