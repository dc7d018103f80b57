"""A request on its way through the gateway, its answer, and the entries of its line in the log."""

from __future__ import annotations

import asyncio
import json
import traceback
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, Response
from starlette.routing import Route, Router

from dfmcl.common.errors import AnswerError
from dfmcl.common.tracing import Told
from dfmcl.serving.gateway import pages
from dfmcl.serving.gateway.api_keys import Caller
from dfmcl.serving.gateway.problems import RETRY_SECONDS, Problem


def say(entry: dict[str, Any]) -> None:
    """Print an entry as one line of JSON, at once."""
    line = json.dumps({"time": datetime.now(UTC).isoformat(timespec="milliseconds"), **entry})
    print(f"{line}\n", end="", flush=True)  # written at once: two threads may have something to say


Routes = dict[str, tuple[str, Callable[[Request], Awaitable[Response]]]]


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
    images: int = 0  # that the model sees
    sent: int = 0  # with those that it cannot see; all are charged for
    version: str | None = None
    endpoint: str | None = None
    asked: npt.NDArray[np.uint8] | None = None  # what was answered, as the model saw it
    inference: bool = False  # whether it asks the model
    told: Told | None = None  # its span, where it is traced

    @property
    def v2(self) -> bool:
        """Whether it speaks KServe's protocol, errors included."""
        return self.path is not None and self.path.startswith("/v2")


@dataclass(frozen=True)
class Wish:
    """What a request asks for, besides the images. seconds: until its deadline, once it is whole."""

    resize: bool
    logits: bool
    seconds: float


@dataclass(frozen=True)
class Sent:
    """How images came. single: one, as such; problems: of a list, by position, None where there is none."""

    single: bool = False
    problems: tuple[Problem | None, ...] = ()


def softmax(logits: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
    """Probabilities (N, K) of logits (N, K); rows sum to 1."""
    powers = np.exp(logits.astype(np.float64) - logits.max(axis=1, keepdims=True))
    return np.asarray(powers / powers.sum(axis=1, keepdims=True))


def router_of(routes: Routes) -> Router:
    return Router(
        [Route(path, handler, methods=[method]) for path, (method, handler) in routes.items()], redirect_slashes=False
    )


def problem_of(error: BaseException) -> Problem:
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


def json_response(content: dict[str, Any], status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(
        json.dumps(content, ensure_ascii=False, separators=(",", ":")),
        status,
        {"cache-control": "no-store", **(headers or {})},
        "application/json",
    )


def page_response(page: pages.Page) -> Response:
    return HTMLResponse(page.html, headers={"content-security-policy": page.policy, "referrer-policy": "no-referrer"})
