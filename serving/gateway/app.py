"""The public door: HTTP in, images checked and decoded, Triton asked over gRPC, JSON out.

    client --HTTP(S)--> Gateway --gRPC--> Triton, Triton, ...

A request passes, in this order: key, rate, parameters, a place among those at work, body, decoder, its turn, Triton.
What needs no body is decided before the body is read. Whatever stops a request is a Problem with a reason from a closed
set. Every request is one JSON line in the log.
"""

from __future__ import annotations

import asyncio
import functools
import json
import math
import re
import secrets
import socket
import ssl
import sys
import threading
import time
import traceback
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, Response
from starlette.routing import Route, Router
from starlette.types import Message, Receive, Scope, Send

from dfmcl.common.errors import AnswerError, BadInput, Broken
from dfmcl.serving.clients.triton import Contract
from dfmcl.serving.detection.detector import Worker
from dfmcl.serving.gateway import images, pages
from dfmcl.serving.gateway.admission import Admission, Place
from dfmcl.serving.gateway.config import GatewayConfig, Tritons, load_config
from dfmcl.serving.gateway.endpoints import Pool, Reply, Security
from dfmcl.serving.gateway.keys import ANYONE, PREFIX, Caller
from dfmcl.serving.gateway.listener import ADMIN_CONNECTIONS, Listener, affordable, bind, tls_context, url_of
from dfmcl.serving.gateway.metrics import DetectionMetrics, Metrics
from dfmcl.serving.gateway.openapi import describe
from dfmcl.serving.gateway.problems import RETRY_SECONDS, Problem
from dfmcl.serving.gateway.renewal import Source, renew
from dfmcl.serving.ready import claim_ready, write_ready

CLASSIFY = "/v1/classify"
QUIET = frozenset({"/healthz", "/readyz", "/metrics"})  # asked every few seconds; logged only where they fail
SECRET = re.compile(rf"{PREFIX}[^/]+")  # an API key that a client has put into a path
PATH_CHARACTERS = 128  # of a stranger's path that go into the log
BYTES_A_NUMBER = 4  # of JSON, with its comma
REQUEST_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
# Decoded on the spot, in about a millisecond at most; what is larger goes to a thread and lets others pass.
SPOT_PIXELS, SPOT_BYTES = 65_536, 65_536
STOP_POLL_SECONDS = 0.05
SWITCH_SECONDS = 0.0005  # after which decoders and detectors let go of the interpreter; 5 ms were many times an answer
PACED = frozenset({"overloaded", "rate_limited", "unauthorized"})  # what costs the asker nothing to hear again

Log = Callable[[dict[str, Any]], None]
Routes = dict[str, tuple[str, Callable[[Request], Awaitable[Response]]]]


def say(entry: dict[str, Any]) -> None:
    """Print an entry as one line of JSON, at once."""
    line = json.dumps({"time": datetime.now(UTC).isoformat(timespec="milliseconds"), **entry})
    print(f"{line}\n", end="", flush=True)  # written at once: two threads may have something to say


def serve(
    config: GatewayConfig,
    *,
    stop: threading.Event,
    port: int | None = None,
    ready_file: Path | None = None,
    source: Path | None = None,
    log: Log = say,
) -> int:
    """Answer HTTP until `stop`, finish what was begun, and return 0.

    port: in place of the configured one; 0 means any free one. ready_file: JSON {http, admin, models, pid, started},
    there from the first moment that a Triton answers until `stop`; `read_ready` does not believe a dead one's. source:
    the file that config was read from, whose keys are read again when it changes. log: told of requests, endpoints and
    where it listens.
    Raises BadInput (2) for certificates that cannot be used or another's ready file, Broken (5) for a port in use.
    """
    if ready_file is not None:
        claim_ready(ready_file)
    listen = config.listen
    tls = tls_context(listen)
    sys.setswitchinterval(SWITCH_SECONDS)
    with ExitStack() as stack:
        public = stack.enter_context(bind(listen.host, listen.port if port is None else port))
        admin = None
        if listen.admin:
            host, _, admin_port = listen.admin.rpartition(":")
            admin = stack.enter_context(bind(host.strip("[]"), int(admin_port), "listen.admin"))
        decoders = stack.enter_context(ThreadPoolExecutor(config.limits.decoders, "decoder"))
        asyncio.run(_Service(config, source, public, admin, tls, decoders, stop, ready_file, log).run())
    return 0


@dataclass(frozen=True)
class _Service:
    """A gateway on its sockets, from the first endpoint's answer to the last request's."""

    config: GatewayConfig
    source: Path | None
    public: socket.socket
    admin: socket.socket | None
    tls: ssl.SSLContext | None
    decoders: Executor
    stop: threading.Event
    ready_file: Path | None
    log: Log

    async def run(self) -> None:
        """Until `stop`."""
        triton = self.config.triton
        pool = Pool(
            triton.endpoints,
            triton.model,
            security=_security(triton),
            check_seconds=triton.check_seconds,
            log=self.log,
        )
        async with pool, AsyncExitStack() as stack:
            gateway = Gateway(self.config, pool, self.decoders, self.log)
            stack.enter_context(gateway.detection or nullcontext())
            if self.admin is not None:
                await stack.enter_async_context(_listening(self._admin_listener(gateway), self.admin))
            server = self._listener(gateway)
            await stack.enter_async_context(_in_background(renew(self._sources(gateway, pool, server), self.log)))
            await self._answer(gateway, pool, server)

    async def _answer(self, gateway: Gateway, pool: Pool, server: Listener) -> None:
        urls = {"http": url_of(self.public, tls=self.tls is not None)}
        urls |= {"admin": url_of(self.admin)} if self.admin else {}
        serving = asyncio.create_task(server.serve(sockets=[self.public]))
        try:
            where = {"url": urls["http"]} | ({"admin": urls["admin"]} if self.admin else {})
            self.log({"event": "listening", **where, "model": self.config.triton.model})
            if await _until(self.stop, serving, lambda: gateway.ready):
                with _announced(urls, pool, self.ready_file):
                    await _until(self.stop, serving, lambda: False)
        finally:
            gateway.stopping = True
            self.log({"event": "stopping"})
            if not serving.done():
                await asyncio.sleep(self.config.listen.notice_seconds)
            server.should_exit = True
            await serving

    def _listener(self, gateway: Gateway) -> Listener:
        limits = self.config.limits
        most = affordable(limits.connections)
        if most < limits.connections:
            self.log({"event": "connections", "most": most, "why": "no more open files are allowed (ulimit -n)"})
        return Listener(
            gateway,
            patience=limits.read_seconds,
            most=most,
            drain=self.config.listen.drain_seconds,
            cut_off=gateway.cut_off,
            tls=self.tls,
        )

    def _admin_listener(self, gateway: Gateway) -> Listener:
        return Listener(
            gateway.administration,
            patience=self.config.limits.read_seconds,
            most=ADMIN_CONNECTIONS,
            drain=1.0,
            cut_off=gateway.cut_off,
        )

    def _sources(self, gateway: Gateway, pool: Pool, server: Listener) -> list[Source]:
        """What is read again when it changes."""
        listen, triton = self.config.listen, self.config.triton

        def certificates() -> bool:
            server.tls = tls_context(listen)
            return True

        def security() -> bool:
            pool.reconnect(_security(triton), self.config.limits.max_timeout_ms / 1000)
            return True

        files = [name for name in (listen.tls_certificate, listen.tls_key, listen.tls_client_ca) if name]
        towards = [name for name in (triton.tls_ca, triton.tls_certificate, triton.tls_key) if name]
        sources = [Source("listen", files, certificates), Source("triton", towards, security)]
        if self.source is not None:
            path = self.source
            sources.append(Source("keys", [path], lambda: gateway.renew(load_config(path))))
            sources[-1].acted = ()  # it may have changed since it was read
        return sources


@asynccontextmanager
async def _in_background(work: Coroutine[Any, Any, None]) -> AsyncIterator[None]:
    """Something is done for as long as the block runs."""
    task = asyncio.create_task(work)
    try:
        yield
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task


@asynccontextmanager
async def _listening(server: Listener, listener: socket.socket) -> AsyncIterator[None]:
    """A second address, for as long as the block runs."""
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    try:
        yield
    finally:
        server.should_exit = True
        await serving


async def _until(stop: threading.Event, serving: asyncio.Task[None], condition: Callable[[], bool]) -> bool:
    """Wait for a condition; False where it is time to stop first. `stop` is set by other threads, so it is polled."""
    while not stop.is_set() and not serving.done():
        if condition():
            return True
        await asyncio.sleep(STOP_POLL_SECONDS)
    return False


@contextmanager
def _announced(urls: dict[str, str], pool: Pool, ready_file: Path | None) -> Iterator[None]:
    """Keep in ready_file where the gateway is, for as long as the block runs."""
    if ready_file is None:
        yield
        return
    models = {endpoint.served.model: endpoint.served.version for endpoint in pool.endpoints if endpoint.served}
    try:
        write_ready(ready_file, **urls, models=models)
    except OSError as error:
        raise Broken(f"{ready_file}: cannot be written: {error.strerror}") from None
    try:
        yield
    finally:
        with suppress(OSError):  # its storage is away; nobody believes it once this process has ended
            ready_file.unlink(missing_ok=True)


def _security(triton: Tritons) -> Security | None:
    """TLS towards Triton, where it is asked for; BadInput where one of its files is not there, or cannot be used."""
    files = (triton.tls_ca, triton.tls_certificate, triton.tls_key)
    if missing := [name for name in files if name and not Path(name).is_file()]:
        raise BadInput(f"triton: TLS needs {missing[0]}, which is no file")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)  # gRPC would tell nobody
    try:
        if triton.tls_ca:
            context.load_verify_locations(triton.tls_ca)
        if triton.tls_key:
            context.load_cert_chain(triton.tls_certificate, triton.tls_key)
    except OSError as error:
        raise BadInput(
            f"triton: TLS with {', '.join(filter(None, files))} does not work: {error.strerror or error}"
        ) from None
    return Security(*files) if triton.tls else None


@dataclass(slots=True)
class Exchange:
    """A request on its way, with the entries of its line in the log.

    begun, heard: time.monotonic() when its headers were there, and when it was whole. Between the two we wait for the
    client: that is neither our latency nor taken from the time to answer.
    """

    id: str
    method: str | None  # None, as the path, where no request came about
    path: str | None
    client: str | None  # its address, as the network shows it
    begun: float
    heard: float | None = None
    caller: Caller | None = None
    status: int = 0
    reason: str | None = None
    detail: str = ""
    bytes: int = 0
    images: int = 0
    version: str | None = None
    endpoint: str | None = None
    asked: npt.NDArray[np.uint8] | None = None  # what was answered, as the model saw it


@dataclass(frozen=True)
class Wish:
    """What a request asks for, besides the images. seconds: until its deadline, once it is whole."""

    resize: bool
    logits: bool
    seconds: float


class Gateway:
    """The ASGI application."""

    def __init__(self, config: GatewayConfig, pool: Pool, decoders: Executor, log: Log = say) -> None:
        """decoders: the threads that work on large bodies; so few at a time, and with so much memory."""
        self.stopping = False
        self.metrics = Metrics(metadata.version("dfmcl"), pool, lambda: self.ready)
        self.detection: Worker | None = None
        if config.detection.enabled:
            salt, found = secrets.token_bytes(32), DetectionMetrics(self.metrics.registry)
            self.detection = Worker(config.detection, salt, found, log)
        self._config, self._pool, self._decoders, self._log = config, pool, decoders, log
        self._keyring, self._admission = config.keyring(), Admission(config.limits.concurrency, lambda: pool.computed)
        description = describe(config, metadata.version("dfmcl"))
        self._openapi, self._docs = json.dumps(description).encode(), pages.docs(description)
        self._index = pages.index(config.triton.model, needs_key=not config.open)
        health: Routes = {"/healthz": ("GET", self._healthz), "/readyz": ("GET", self._readyz)}
        figures: Routes = {"/metrics": ("GET", self._metrics)}
        public: Routes = {
            CLASSIFY: ("POST", self._classify),
            **health,
            **({} if config.listen.admin else figures),
            "/openapi.json": ("GET", self._describe),
            "/docs": ("GET", self._show_docs),
            "/": ("GET", self._show_index),
        }
        self._router, self._admin_router = _router(public), _router(health | figures)

    @property
    def ready(self) -> bool:
        """Whether requests should be sent here."""
        return self._pool.ready and not self.stopping

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._exchange(self._router, scope, receive, send)

    async def administration(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The ASGI application of the admin address."""
        await self._exchange(self._admin_router, scope, receive, send)

    def renew(self, config: GatewayConfig) -> bool:
        """Take the keys of another configuration from now on; whether they are others.

        BadInput, with the new keys taken, where something else has changed, which is read at the start only.
        """
        before, now = self._config, {"open": config.open, "keys": config.keys}
        differs = (config.open, config.keys) != (before.open, before.keys)
        self._config = before.model_copy(update=now)
        if differs:
            self._keyring = config.keyring(before, self._keyring)
            self._index = pages.index(config.triton.model, needs_key=not config.open)
        others = [name for name in GatewayConfig.model_fields if getattr(config, name) != getattr(self._config, name)]
        if others:
            keys = "keys were renewed" if differs else "keys are the same"
            raise BadInput(f"{', '.join(others)}: read at the start only, so restart the gateway; {keys}")
        return differs

    def cut_off(self, problem: Problem, client: str | None) -> None:
        """Note a connection that was closed before there was a request."""
        self.metrics.refused(problem.reason)
        now = time.monotonic()
        self._note(
            Exchange("", None, None, client, now, status=problem.status, reason=problem.reason, detail=problem.detail)
        )

    async def _exchange(self, router: Router, scope: Scope, receive: Receive, send: Send) -> None:
        given, client = Headers(scope=scope).get("x-request-id", ""), scope.get("client")
        exchange = Exchange(
            given if REQUEST_ID.fullmatch(given) else secrets.token_hex(16),
            scope["method"],
            scope["path"],
            client[0] if client else None,
            time.monotonic(),
        )

        async def answer(message: Message) -> None:
            if message["type"] == "http.response.start":
                exchange.status = message["status"]
                message["headers"] += self._common_headers(exchange)
            await send(message)

        # Starlette raises an error of routing only inside of a callable that it takes for an application.
        scope["app"], scope["exchange"] = self, exchange
        try:
            await router(scope, receive, answer)
        except (Exception, asyncio.CancelledError) as error:  # noqa: BLE001 - a request ends with an answer
            problem = _problem(error)
            exchange.reason, exchange.detail = problem.reason, problem.detail
            if exchange.status == 0:
                headers = problem.headers | (getattr(error, "headers", None) or {})
                if problem.reason in PACED:
                    unread = int(Headers(scope=scope).get("content-length", 0)) - exchange.bytes
                    await asyncio.sleep(self._admission.pause(unread))
                response = _json(problem.to_json(exchange.id), problem.status, headers)
                await response(scope, receive, answer)
        finally:
            self._record(exchange)
            if self.detection and exchange.caller and exchange.asked is not None:
                self.detection.offer(exchange.caller, exchange.asked)

    def _common_headers(self, exchange: Exchange) -> list[tuple[bytes, bytes]]:
        headers = [(b"x-request-id", exchange.id.encode()), (b"x-content-type-options", b"nosniff")]
        # A client that is about to lose this server goes elsewhere for its next request; one that dawdled has to.
        if self.stopping or exchange.reason == "slow_client":
            headers.append((b"connection", b"close"))
        return headers

    def _record(self, exchange: Exchange) -> None:
        now, caller = time.monotonic(), exchange.caller
        if exchange.path == CLASSIFY:
            self.metrics.ended(
                exchange.status,
                exchange.reason,
                now - (exchange.heard or exchange.begun),
                images=exchange.images,
                canary=caller is not None and caller.canary,
            )
        elif exchange.path in QUIET and exchange.status < 400:
            return
        elif exchange.reason is not None and exchange.path != "/readyz":  # no news: gateway_ready says it too
            self.metrics.refused(exchange.reason)
        self._note(exchange)

    def _note(self, exchange: Exchange) -> None:
        """Its line in the log, with nothing in it that a stranger may have written but a short path without a key."""
        path = None if exchange.path is None else SECRET.sub(f"{PREFIX}...", exchange.path)[:PATH_CHARACTERS]
        entry = {
            "event": "request",
            "id": exchange.id or None,
            "client": exchange.client,
            "method": exchange.method,
            "path": path,
            "key": exchange.caller.name if exchange.caller else None,
            "status": exchange.status,
            "reason": exchange.reason,
            "ms": round(1000 * (time.monotonic() - exchange.begun), 2),
            "bytes": exchange.bytes,
            "version": exchange.version,
            "endpoint": exchange.endpoint,
        }
        self._log(entry | ({"detail": exchange.detail} if exchange.detail else {}))

    async def _classify(self, request: Request) -> Response:
        exchange: Exchange = request.scope["exchange"]
        caller = exchange.caller = self._keyring.caller(request.headers)
        promised = self._promised(request)
        caller.spend(promised)
        try:
            return await self._classified(request, exchange, caller, promised)
        finally:
            caller.correct(max(1, exchange.images) - promised)

    async def _classified(self, request: Request, exchange: Exchange, caller: Caller, promised: int) -> Response:
        wish = self._wish(request, caller)
        with self._place(exchange, caller, promised, wish) as place:
            body = await self._body(request, exchange)
            exchange.heard = time.monotonic()
            self._admission.arrived(place, promised)
            try:
                async with asyncio.timeout(wish.seconds):
                    batch, single = await self._decoded(request, body, self._pool.contract, wish)
                    exchange.images = len(batch)
                    self._admission.arrived(place, exchange.images)
                    reply = await self._pool.infer(
                        batch, deadline=exchange.heard + wish.seconds, flow=place.flow, canary=caller.canary
                    )
            except TimeoutError:
                raise Problem("deadline", "no answer before the deadline; X-Request-Timeout-Ms asks for more") from None
        exchange.version, exchange.endpoint = reply.version, reply.endpoint
        exchange.asked = batch
        return _json(self._answer(reply, wish, exchange.id, single=single))

    def _promised(self, request: Request) -> int:
        """How many images a request will hold, as far as its headers tell: a file holds one, JSON as many as fit."""
        contract, headers = self._pool.contract, request.headers
        if images.media_type(headers.get("content-type", "")) != images.TENSOR:
            return 1
        size = int(headers.get("content-length", self._config.limits.body_bytes))
        return min(max(1, size // (BYTES_A_NUMBER * math.prod(contract.input_shape))), contract.max_batch_size)

    def _wish(self, request: Request, caller: Caller) -> Wish:
        query = request.query_params
        flags = {"resize": False, "logits": False}
        for name, text in query.multi_items():
            if name not in flags or text not in ("true", "false"):
                raise Problem("bad_request", f"query: may hold {' and '.join(flags)}, each true or false")
            flags[name] = text == "true"
        if flags["logits"] and not caller.logits:
            raise Problem("forbidden", f"key {caller.name!r} may not see logits")
        limits = self._config.limits
        text = request.headers.get("x-request-timeout-ms", str(limits.timeout_ms))
        if not re.fullmatch(r"[1-9][0-9]{0,8}", text):
            raise Problem("bad_request", "X-Request-Timeout-Ms: expected a whole number of milliseconds above 0")
        milliseconds = min(int(text), limits.max_timeout_ms)
        return Wish(flags["resize"], flags["logits"], milliseconds / 1000)

    @contextmanager
    def _place(self, exchange: Exchange, caller: Caller, promised: int, wish: Wish) -> Iterator[Place]:
        """A place among the requests at work; a Problem where there is none, or its answer would come too late."""
        flow = exchange.client or "" if caller is ANYONE else caller.name
        try:
            with self._admission.place(flow, promised, wish.seconds) as place:
                self.metrics.in_flight.set(len(self._admission))
                yield place
        finally:
            self.metrics.in_flight.set(len(self._admission))

    async def _body(self, request: Request, exchange: Exchange) -> bytes:
        """The whole body, not one byte more than allowed, from a client that does not dawdle."""
        limits, headers = self._config.limits, request.headers
        if headers.get("content-encoding", "identity") != "identity":
            raise Problem("unsupported_type", "body: send it without Content-Encoding")
        most = limits.body_bytes
        too_large = Problem("too_large", f"body: may have up to {most} bytes")
        if int(headers.get("content-length", 0)) > most:
            raise too_large
        parts = []
        try:
            async with asyncio.timeout(limits.read_seconds):
                async for part in request.stream():
                    exchange.bytes += len(part)
                    if exchange.bytes > most:
                        raise too_large
                    parts.append(part)
        except TimeoutError:
            raise Problem("slow_client", f"body: not there within {limits.read_seconds:g} s") from None
        return b"".join(parts)

    async def _decoded(
        self, request: Request, body: bytes, contract: Contract, wish: Wish
    ) -> tuple[npt.NDArray[np.uint8], bool]:
        """The body as uint8 (N, H, W, C), and whether it is one image, rather than a tensor."""
        kind, spot = images.media_type(request.headers.get("content-type", "")), len(body) <= SPOT_BYTES
        if kind == images.TENSOR:
            return await self._worked(spot, images.tensor, body, contract), False
        if kind == images.FORM:
            body, kind = await self._worked(spot, images.form_field, body, request.headers["content-type"])
        if kind not in images.FORMATS and kind not in images.UNTOLD:
            raise Problem("unsupported_type", f"Content-Type: expected none, or one of {', '.join(images.TYPES)}")
        image = await self._worked(spot, images.open_image, body, kind, self._config.limits.pixels)
        if not wish.resize:
            images.require_size(image, contract)
        spot = spot and image.width * image.height <= SPOT_PIXELS
        return await self._worked(spot, images.pixels, image, contract, resize=wish.resize), True

    async def _worked(self, spot: bool, work: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        """The result of some work on a stranger's bytes: done on the spot, or by one of a few threads."""
        if spot:
            return work(*arguments, **options)
        call = functools.partial(work, *arguments, **options)
        return await asyncio.get_running_loop().run_in_executor(self._decoders, call)

    def _answer(self, reply: Reply, wish: Wish, request_id: str, *, single: bool) -> dict[str, Any]:
        about = {"model": self._config.triton.model, "version": reply.version, "request_id": request_id}
        shares = softmax(reply.logits)
        predictions = [
            self._prediction(row, share, reply.labels, logits=wish.logits)
            for row, share in zip(reply.logits, shares, strict=True)
        ]
        return {**predictions[0], **about} if single else {"predictions": predictions, **about}

    def _prediction(
        self, row: npt.NDArray[np.float32], share: npt.NDArray[np.float64], labels: tuple[str, ...], *, logits: bool
    ) -> dict[str, Any]:
        """Of one image: the label, the best few classes, and where wished the logits, in class order."""
        answers = self._config.answers
        best = np.argsort(-row, kind="stable")[: answers.top].tolist()
        top = [
            {"label": labels[index], "index": index, "probability": round(float(share[index]), answers.decimals)}
            for index in best
        ]
        found = {"label": labels[best[0]], "index": best[0], "top": top}
        return {**found, "logits": row.tolist()} if logits else found

    async def _healthz(self, request: Request) -> Response:
        return _json({"status": "alive"})

    async def _readyz(self, request: Request) -> Response:
        if self.ready:
            return _json({"status": "ready"})
        why = "this gateway is stopping" if self.stopping else "no Triton answers"
        raise Problem("unavailable", why, retry_seconds=RETRY_SECONDS)

    async def _metrics(self, request: Request) -> Response:
        if not (self._config.listen.public_metrics or self._config.listen.admin):
            self._keyring.caller(request.headers)
        return Response(self.metrics.exposition(), media_type="text/plain; version=0.0.4; charset=utf-8")

    async def _describe(self, request: Request) -> Response:
        return Response(self._openapi, media_type="application/json")

    async def _show_docs(self, request: Request) -> Response:
        return _page(self._docs)

    async def _show_index(self, request: Request) -> Response:
        return _page(self._index)


def softmax(logits: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
    """Probabilities (N, K) of logits (N, K); rows sum to 1."""
    powers = np.exp(logits.astype(np.float64) - logits.max(axis=1, keepdims=True))
    return np.asarray(powers / powers.sum(axis=1, keepdims=True))


def _router(routes: Routes) -> Router:
    return Router(
        [Route(path, handler, methods=[method]) for path, (method, handler) in routes.items()], redirect_slashes=False
    )


def _problem(error: BaseException) -> Problem:
    """What an exception means to the client."""
    if isinstance(error, Problem):
        return error
    if isinstance(error, AnswerError):
        return Problem.of(error)
    if isinstance(error, HTTPException):
        reason = "method_not_allowed" if error.status_code == 405 else "not_found"
        return Problem(reason, "see /docs for what there is")
    if isinstance(error, asyncio.CancelledError):  # drain_seconds were not enough for it
        return Problem("unavailable", "this gateway has stopped; try again", retry_seconds=RETRY_SECONDS)
    if isinstance(error, ClientDisconnect):
        return Problem("client_left", "the client left before its request was whole")
    where = traceback.extract_tb(error.__traceback__)[-1]
    detail = f"{type(error).__name__}: {error} ({Path(where.filename).name}:{where.lineno})"
    return Problem("internal", "something broke in here; the log knows what", detail=detail)


def _json(content: dict[str, Any], status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(
        json.dumps(content, ensure_ascii=False, separators=(",", ":")),
        status,
        {"cache-control": "no-store", **(headers or {})},
        "application/json",
    )


def _page(page: pages.Page) -> Response:
    return HTMLResponse(page.html, headers={"content-security-policy": page.policy, "referrer-policy": "no-referrer"})
