"""The public door: HTTP in, images checked and decoded, Triton asked over gRPC, JSON out.

Long, because the class is one order of questions.

    client --HTTP(S)--> Gateway --gRPC--> Triton, Triton, ...

A request passes, in this order: key, rate, parameters, a place among those at work, body, decoder, its turn, Triton.
What needs no body is decided before the body is read. Whatever stops a request is a Problem with a reason from a closed
set. Every request is one JSON line in the log.
"""

from __future__ import annotations

import asyncio
import json
import math
import re
import secrets
import time
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import Executor
from contextlib import contextmanager
from importlib import metadata
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Router
from starlette.types import Message, Receive, Scope, Send

from dfmcl.common.errors import BadInput
from dfmcl.common.tracing import Told, Tracing
from dfmcl.serving.detection.detector import Worker
from dfmcl.serving.gateway import images, pages, v2
from dfmcl.serving.gateway.admission import Admission, Place
from dfmcl.serving.gateway.api_keys import ANYONE, PREFIX, Caller
from dfmcl.serving.gateway.claims import Record, reader
from dfmcl.serving.gateway.config import GatewayConfig
from dfmcl.serving.gateway.decoder import Decoder
from dfmcl.serving.gateway.endpoints import Reply
from dfmcl.serving.gateway.exchange import (
    Exchange,
    Routes,
    Sent,
    Wish,
    json_response,
    page_response,
    problem_of,
    router_of,
    say,
    softmax,
)
from dfmcl.serving.gateway.metrics import DetectionMetrics, Metrics
from dfmcl.serving.gateway.openapi import describe
from dfmcl.serving.gateway.pool import Pool
from dfmcl.serving.gateway.problems import RETRY_SECONDS, Problem

CLASSIFY, ABOUT = "/v1/classify", "/v1/model"
QUIET = frozenset({"/healthz", "/readyz", "/metrics"})  # asked every few seconds; logged only where they fail
SECRET = re.compile(rf"{PREFIX}[^/]+")  # an API key that a client has put into a path
PATH_CHARACTERS = 128  # of a stranger's path that go into the log
BYTES_A_NUMBER = 4  # of JSON, with its comma
REQUEST_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
PACED = frozenset({"overloaded", "rate_limited", "unauthorized"})  # what costs the asker nothing to hear again

Log = Callable[[dict[str, Any]], None]
T = TypeVar("T")


class Gateway:
    """The ASGI application."""

    def __init__(
        self, config: GatewayConfig, pool: Pool, decoders: Executor, log: Log = say, traces: Tracing | None = None
    ) -> None:
        """decoders: the threads that work on large bodies; so few at a time, and with so much memory."""
        self.stopping = False
        self.metrics = Metrics(metadata.version("dfmcl"), pool, lambda: self.ready)
        self.detection: Worker | None = None
        if config.detection.enabled:
            salt, found = secrets.token_bytes(32), DetectionMetrics(self.metrics.registry)
            self.detection = Worker(config.detection, salt, found, log)
        self._config, self._pool, self._log, self._traces = config, pool, log, traces
        self._decoder = Decoder(decoders, config.limits.pixels, self.metrics.unseen)
        self._keyring, self._admission = config.keyring(), Admission(config.limits.concurrency, lambda: pool.computed)
        self._describe_itself()
        self._record = Record(reader(config.release.repository, config.triton.model, config.release.trust))
        health: Routes = {"/healthz": ("GET", self._healthz), "/readyz": ("GET", self._readyz)}
        figures: Routes = {"/metrics": ("GET", self._metrics)}
        public: Routes = {
            CLASSIFY: ("POST", self._classify),
            ABOUT: ("GET", self._about),
            **self._v2,
            **health,
            **({} if config.listen.admin else figures),
            "/openapi.json": ("GET", self._describe),
            "/docs": ("GET", self._show_docs),
            "/": ("GET", self._show_index),
        }
        self._router, self._admin_router = router_of(public), router_of(health | figures)

    def _describe_itself(self) -> None:
        """Make the document and the pages, which say whether a key is needed."""
        config, description = self._config, describe(self._config, metadata.version("dfmcl"))
        self._openapi = json.dumps(description).encode()
        needs_key, root = not config.open, config.listen.root_path
        self._index = pages.index(config.triton.model, needs_key=needs_key, root=root)
        self._docs = pages.docs(description, needs_key=needs_key, root=root)

    @property
    def ready(self) -> bool:
        """Whether requests should be sent here."""
        return self._pool.ready and not self.stopping

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self._traces is None or scope["path"] in QUIET:
            await self._exchange(self._router, scope, receive, send)
            return
        parent = self._traces.extracted(Headers(scope=scope))
        with self._traces.span(scope["method"], "server", parent, http__request__method=scope["method"]) as told:
            scope["told"] = told
            await self._exchange(self._router, scope, receive, send)
            _conclude(told, scope["exchange"])

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
            self._describe_itself()
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
            told=scope.get("told"),
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
            problem = problem_of(error)
            exchange.reason, exchange.detail = problem.reason, problem.detail
            if exchange.status == 0:
                headers = problem.headers | (getattr(error, "headers", None) or {})
                if problem.reason in PACED:
                    unread = int(Headers(scope=scope).get("content-length", 0)) - exchange.bytes
                    await asyncio.sleep(self._admission.pause(unread))
                told: dict[str, Any] = problem.to_v2() if exchange.v2 else problem.to_json(exchange.id)
                response = json_response(told, problem.status, headers)
                await response(scope, receive, answer)
        finally:
            self._keep(exchange)
            if self.detection and exchange.caller and exchange.asked is not None:
                self.detection.offer(exchange.caller, exchange.asked)

    def _common_headers(self, exchange: Exchange) -> list[tuple[bytes, bytes]]:
        headers = [(b"x-request-id", exchange.id.encode()), (b"x-content-type-options", b"nosniff")]
        # A client that is about to lose this server goes elsewhere for its next request; one that dawdled has to.
        if self.stopping or exchange.reason == "slow_client":
            headers.append((b"connection", b"close"))
        return headers

    def _keep(self, exchange: Exchange) -> None:
        now, caller = time.monotonic(), exchange.caller
        if exchange.path == CLASSIFY or exchange.inference:
            self.metrics.ended(
                exchange.status,
                exchange.reason,
                now - (exchange.heard or exchange.begun),
                images=exchange.images,
                canary=caller is not None and caller.canary,
                trace=exchange.told.trace if exchange.told else "",
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
        async def decoded(body: bytes, wish: Wish) -> tuple[npt.NDArray[np.uint8], Sent]:
            kind = request.headers.get("content-type", "")
            return await self._decoder.batch(body, kind, self._pool.contract, request.scope["exchange"], wish)

        reply, sent, wish = await self._asked(request, decoded)
        return json_response(self._answer(reply, wish, request.scope["exchange"].id, sent))

    async def _infer(self, request: Request) -> Response:
        """The same in KServe's protocol, which answers with logits."""
        self._require_served(request)
        header = request.headers.get(v2.HEADER_LENGTH)

        async def decoded(body: bytes, wish: Wish) -> tuple[npt.NDArray[np.uint8], v2.Question]:
            found = await self._decoder.question(body, header, self._pool.contract)
            return found.images, found

        reply, asked, _ = await self._asked(request, decoded, logits=True)
        self._require_version(request, reply.version)
        body, headers = v2.answer(reply, asked, self._config.triton.model, self._pool.contract)
        return Response(body, headers={"cache-control": "no-store", **headers})

    async def _asked(
        self,
        request: Request,
        decoded: Callable[[bytes, Wish], Awaitable[tuple[npt.NDArray[np.uint8], T]]],
        *,
        logits: bool = False,
    ) -> tuple[Reply, T, Wish]:
        """The reply to a request, what else `decoded` made of its body, and its wish. logits: whether it sees them."""
        exchange: Exchange = request.scope["exchange"]
        exchange.inference = True
        caller = exchange.caller = self._keyring.caller(request.headers)
        promised = self._promised(request)
        caller.spend(promised)
        try:
            wish = self._wish(request, caller)
            if logits and not caller.logits:
                raise Problem("forbidden", f"key {caller.name!r} may not see logits; {CLASSIFY} answers without")
            with self._place(exchange, caller, promised, wish) as place:
                body = await self._body(request, exchange)
                exchange.heard = time.monotonic()
                self._admission.arrived(place, promised)
                try:
                    async with asyncio.timeout(wish.seconds):
                        batch, more = await decoded(body, wish)
                        exchange.images = len(batch)
                        exchange.sent = max(exchange.sent, exchange.images)
                        self._admission.arrived(place, exchange.images)
                        deadline = exchange.heard + wish.seconds
                        reply = await self._pool.infer(
                            batch, deadline=deadline, flow=place.flow, canary=caller.canary, told=exchange.told
                        )
                except TimeoutError:
                    why = "no answer before the deadline; X-Request-Timeout-Ms asks for more"
                    raise Problem("deadline", why) from None
            exchange.version, exchange.endpoint = reply.version, reply.endpoint
            exchange.asked = batch
            return reply, more, wish
        finally:
            caller.correct(max(1, exchange.sent) - promised)

    def _promised(self, request: Request) -> int:
        """How many images a request will hold, by its headers: a file holds one, a tensor as many as fit."""
        contract, headers = self._pool.contract, request.headers
        binary = v2.HEADER_LENGTH in headers
        if not binary and images.media_type(headers.get("content-type", "")) != images.TENSOR:
            return 1
        size = int(headers.get("content-length", self._config.limits.body_bytes))
        of_one = (1 if binary else BYTES_A_NUMBER) * math.prod(contract.input_shape)
        return min(max(1, size // of_one), contract.max_batch_size)

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

    def _answer(self, reply: Reply, wish: Wish, request_id: str, sent: Sent) -> dict[str, Any]:
        about = {"model": self._config.triton.model, "version": reply.version, "request_id": request_id}
        shares = softmax(reply.logits)
        predictions = [
            self._prediction(row, share, reply.labels, logits=wish.logits)
            for row, share in zip(reply.logits, shares, strict=True)
        ]
        if sent.single:
            return {**predictions[0], **about}
        if sent.problems:
            seen = iter(predictions)
            predictions = [next(seen) if problem is None else problem.of_image() for problem in sent.problems]
        return {"predictions": predictions, **about}

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

    @property
    def _v2(self) -> Routes:
        """KServe's protocol."""
        model = "/v2/models/{model}"
        routes: Routes = {"/v2": ("GET", self._server), "/v2/health/live": ("GET", self._healthz)}
        routes["/v2/health/ready"] = ("GET", self._readyz)
        for place in (model, f"{model}/versions/{{version}}"):
            routes[place] = ("GET", self._metadata)
            routes[f"{place}/ready"] = ("GET", self._model_ready)
            routes[f"{place}/infer"] = ("POST", self._infer)
        return routes

    async def _server(self, request: Request) -> Response:
        about = {"name": "dfmcl-gateway", "version": metadata.version("dfmcl"), "extensions": list(v2.EXTENSIONS)}
        return json_response(about)

    async def _metadata(self, request: Request) -> Response:
        self._keyring.caller(request.headers)
        self._require_served(request)
        return json_response(v2.metadata(self._config.triton.model, self._pool.version, self._pool.contract))

    async def _model_ready(self, request: Request) -> Response:
        self._require_served(request)
        return await self._readyz(request)

    def _require_served(self, request: Request) -> None:
        """A Problem where the path names another model, or a version that is not served."""
        if request.path_params["model"] != self._config.triton.model:
            raise Problem("not_found", f"the model here is {self._config.triton.model!r}")
        self._require_version(request, self._pool.version)

    def _require_version(self, request: Request, served: str) -> None:
        if request.path_params.get("version", served) != served:
            raise Problem("not_found", f"version {served} is served; leave the version out, or name it")

    async def _about(self, request: Request) -> Response:
        """The model that answers now, and what the gate recorded about it."""
        caller, served = self._keyring.caller(request.headers), self._pool.served
        contract, limits = self._pool.contract, self._config.limits
        height, width, channels = contract.input_shape
        claims = await self._record.of(served.version)
        return json_response(
            {
                "model": served.model,
                "version": served.version,
                "ready": self.ready,
                "labels": list(served.labels),
                "image": {"height": height, "width": width, "channels": channels},
                "limits": {"images": contract.max_batch_size, "bytes": limits.body_bytes, "pixels": limits.pixels},
                "logits": caller.logits,
                "gate": claims.to_json(),
            }
        )

    async def _healthz(self, request: Request) -> Response:
        return json_response({"status": "alive"})

    async def _readyz(self, request: Request) -> Response:
        if self.ready:
            return json_response({"status": "ready"})
        why = "this gateway is stopping" if self.stopping else "no Triton answers"
        raise Problem("unavailable", why, retry_seconds=RETRY_SECONDS)

    async def _metrics(self, request: Request) -> Response:
        if not (self._config.listen.public_metrics or self._config.listen.admin):
            self._keyring.caller(request.headers)
        if self._traces is not None:  # exemplars are OpenMetrics, which only who asks for it can read
            written, kind = self.metrics.exposition_for(request.headers.get("accept", ""))
            return Response(written, headers={"content-type": kind})
        return Response(self.metrics.exposition(), media_type="text/plain; version=0.0.4; charset=utf-8")

    async def _describe(self, request: Request) -> Response:
        return Response(self._openapi, media_type="application/json")

    async def _show_docs(self, request: Request) -> Response:
        return page_response(self._docs)

    async def _show_index(self, request: Request) -> Response:
        return page_response(self._index)


def _conclude(told: Told, exchange: Exchange) -> None:
    """The attributes of a request's span: the words of its line in the log, and no more."""
    place = "/v2/models/{model}/infer" if exchange.v2 else exchange.path or ""
    if exchange.inference:
        told.span.update_name(f"{exchange.method} {place}")
    told.note(
        http__response__status_code=exchange.status,
        dfmcl__request_id=exchange.id,
        dfmcl__images=exchange.images,
        dfmcl__version=exchange.version,
        dfmcl__reason=exchange.reason,
        dfmcl__key=exchange.caller.name if exchange.caller else None,
    )
    if exchange.status >= 500:
        told.fail(exchange.reason or "")
