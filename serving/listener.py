"""The socket, and uvicorn on it: TLS, clients that never finish a request, and an end that loses none.

Everything after a request's headers is the application's business.
"""

from __future__ import annotations

import asyncio
import functools
import json
import socket
import ssl
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from serving.errors import BadInput, Broken
from serving.gateway_config import GatewayConfig, Listen
from serving.problems import RETRY_SECONDS, Problem

HEADER_BYTES = 65_536  # of one request
IDLE_SECONDS = 30  # of a connection between two requests


def bind(listen: Listen, port: int) -> socket.socket:
    """A listening socket; Broken where the address cannot be had."""
    family = socket.AF_INET6 if ":" in listen.host else socket.AF_INET
    try:
        listener = socket.create_server((listen.host, port), family=family, backlog=2048)
    except OSError as error:
        raise Broken(
            f"cannot listen on {listen.host}:{port} ({error.strerror or error}); choose another listen.port, or 0"
        ) from None
    # Connections inherit it. asyncio sets it only on sockets of another making, and without it a response waits 40 ms
    # between its headers and its body for the client's delayed acknowledgement.
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listener


def url_of(listener: socket.socket, listen: Listen) -> str:
    """Where clients find it."""
    host, port = listener.getsockname()[:2]
    return f"{'https' if listen.tls_key else 'http'}://{f'[{host}]' if ':' in host else host}:{port}"


def require_tls_files(listen: Listen) -> None:
    """BadInput where a certificate or key cannot be used, before anything is started."""
    if not listen.tls_key:
        return
    try:
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=listen.tls_client_ca or None)
        context.load_cert_chain(listen.tls_certificate, listen.tls_key)
    except (OSError, ssl.SSLError) as error:
        names = [name for name in (listen.tls_certificate, listen.tls_key, listen.tls_client_ca) if name]
        raise BadInput(f"listen: TLS with {', '.join(names)} does not work: {error.strerror or error}") from None


class Listener(uvicorn.Server):
    """uvicorn that is told when to end; it leaves signals alone, as it need not be the process's only work."""

    def __init__(self, application: Any, config: GatewayConfig, cut_off: Callable[[str], None]) -> None:
        """cut_off: told the reason of a connection that is closed before there is a request."""
        listen, limits = config.listen, config.limits
        protocol = functools.partial(Connection, patience=limits.read_seconds, most=limits.connections, cut_off=cut_off)
        super().__init__(
            uvicorn.Config(
                application,
                http=protocol,  # type: ignore[arg-type]  # it is called as the class would be
                ws="none",
                lifespan="off",
                log_config=None,
                log_level="error",  # every stranger's half request is a warning to it
                access_log=False,
                proxy_headers=False,
                server_header=False,
                timeout_keep_alive=IDLE_SECONDS,
                timeout_graceful_shutdown=listen.drain_seconds,  # type: ignore[arg-type]  # it goes to wait_for
                ssl_certfile=listen.tls_certificate or None,
                ssl_keyfile=listen.tls_key or None,
                ssl_ca_certs=listen.tls_client_ca or None,
                ssl_cert_reqs=ssl.CERT_REQUIRED if listen.tls_client_ca else ssl.CERT_NONE,
            )
        )

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class Connection(HttpToolsProtocol):
    """A client's connection. Between two requests uvicorn ends it after IDLE_SECONDS; here it ends as well if there are
    too many, if headers are too long or take longer than `patience` seconds, or if a body that was refused goes on
    for so long."""

    def __init__(self, *args: Any, patience: float, most: int, cut_off: Callable[[str], None], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._patience, self._most, self._cut_off = patience, most, cut_off
        self._alarm: asyncio.TimerHandle | None = None
        self._header_bytes, self._in_body = 0, False

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        if len(self.connections) > self._most:
            self._leave(Problem("overloaded", "too many connections; try again later", retry_seconds=RETRY_SECONDS))
        else:
            self._wait()

    def data_received(self, data: bytes) -> None:
        if self.transport.is_closing():
            return
        if self.cycle is None or self.cycle.response_complete:
            self._wait()
            self._header_bytes += 0 if self._in_body else len(data)
        super().data_received(data)
        if self._header_bytes > HEADER_BYTES and not self.transport.is_closing():
            self._leave(Problem("bad_request", f"headers: more than {HEADER_BYTES} bytes"))

    def on_headers_complete(self) -> None:
        self._calm()
        self._in_body = True
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        self._calm()
        self._in_body = False
        super().on_message_complete()

    def connection_lost(self, exc: Exception | None) -> None:
        self._calm()
        super().connection_lost(exc)

    def send_400_response(self, msg: str) -> None:
        """What uvicorn says to something that is no HTTP."""
        self._leave(Problem("bad_request", "this is no HTTP request"))

    def _wait(self) -> None:
        if self._alarm is None:
            self._alarm = self.loop.call_later(self._patience, self._too_slow)

    def _calm(self) -> None:
        self._header_bytes = 0
        if self._alarm is not None:
            self._alarm.cancel()
            self._alarm = None

    def _too_slow(self) -> None:
        if self.transport.is_closing():
            return
        if self._in_body or not self._header_bytes:  # it was answered, or never asked
            self.transport.close()
        else:
            self._leave(Problem("slow_client", f"no whole request within {self._patience:g} s"))

    def _leave(self, problem: Problem) -> None:
        self._calm()
        self._cut_off(problem.reason)
        body = json.dumps(problem.to_json(None)).encode()
        lines = [
            f"HTTP/1.1 {problem.status} {problem.reason}",
            "content-type: application/json",
            f"content-length: {len(body)}",
            *(f"{name}: {value}" for name, value in problem.headers.items()),
            "connection: close",
        ]
        self.transport.write("\r\n".join([*lines, "", ""]).encode() + body)
        self.transport.close()
