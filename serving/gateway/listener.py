"""The sockets, and uvicorn on them: TLS, clients that never finish a request, and an end that loses none.

Everything after a request's headers is the application's business.
"""

from __future__ import annotations

import asyncio
import functools
import json
import resource
import socket
import ssl
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from dfmcl.common.errors import BadInput, Broken
from dfmcl.serving.gateway.config import ListenSection
from dfmcl.serving.gateway.problems import RETRY_SECONDS, Problem

HEADER_BYTES = 65_536  # of one request
IDLE_SECONDS = 30  # of a connection between two requests
BACKLOG = 256  # connections that are accepted at once, before the first of them can be closed
OTHER_FILES = 256  # open for other purposes: connections to Triton, the admin address, the log
ADMIN_CONNECTIONS = 64

CutOff = Callable[[Problem, str | None], None]


def bind(host: str, port: int, where: str = "listen.port") -> socket.socket:
    """A listening socket; Broken where the address cannot be had. where: the configuration's key, for the message."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        listener = socket.create_server((host, port), family=family, backlog=BACKLOG)
    except OSError as error:
        raise Broken(
            f"cannot listen on {host}:{port} ({error.strerror or error}); choose another {where}, or 0"
        ) from None
    # Connections inherit it. asyncio sets it only on sockets of another making, and without it a response waits 40 ms
    # between its headers and its body for the client's delayed acknowledgement.
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listener


def url_of(listener: socket.socket, *, tls: bool = False) -> str:
    """Where clients find it."""
    host, port = listener.getsockname()[:2]
    return f"{'https' if tls else 'http'}://{f'[{host}]' if ':' in host else host}:{port}"


def affordable(connections: int) -> int:
    """So many of these connections as there may be open files, after the limit was raised as far as is allowed."""
    needed = connections + BACKLOG + OTHER_FILES
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < needed:
        soft = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    return connections if soft == resource.RLIM_INFINITY else max(1, min(connections, soft - BACKLOG - OTHER_FILES))


def tls_context(listen: ListenSection) -> ssl.SSLContext | None:
    """What the files of the configuration say now; BadInput where a certificate or key cannot be used."""
    if not listen.tls_key:
        return None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        context.load_cert_chain(listen.tls_certificate, listen.tls_key)
        if listen.tls_client_ca:
            context.load_verify_locations(listen.tls_client_ca)
            context.verify_mode = ssl.CERT_REQUIRED
            context.options |= ssl.OP_NO_TICKET  # a resumed session would not show its certificate again
            context.num_tickets = 0
    except (OSError, ssl.SSLError) as error:
        names = [name for name in (listen.tls_certificate, listen.tls_key, listen.tls_client_ca) if name]
        raise BadInput(f"listen: TLS with {', '.join(names)} does not work: {error.strerror or error}") from None
    return context


class Listener(uvicorn.Server):
    """uvicorn that is told when to end; it leaves signals alone, because it need not be the process's only work."""

    def __init__(
        self,
        application: Any,
        *,
        patience: float,
        most: int,
        drain: float,
        cut_off: CutOff,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        """patience: seconds for a request's headers; most: connections; drain: seconds for what was begun when it ends.

        cut_off: told the problem of a connection that is closed before there is a request, and the client's address.
        """
        protocol = functools.partial(Connection, patience=patience, most=most, cut_off=cut_off)
        super().__init__(
            uvicorn.Config(
                application,
                interface="asgi3",
                http=protocol,  # type: ignore[arg-type]  # it is called as the class would be
                ws="none",
                lifespan="off",
                log_config=None,
                log_level="error",  # every stranger's half request is a warning to it
                access_log=False,
                proxy_headers=False,
                server_header=False,
                backlog=BACKLOG,
                timeout_keep_alive=IDLE_SECONDS,
                timeout_graceful_shutdown=drain,  # type: ignore[arg-type]  # it goes to wait_for
            )
        )
        self.tls = tls
        self.config.load()
        if tls is not None:
            # Every handshake is lent the newest context; that of the first one stays with the socket.
            tls.sni_callback = lambda connection, name, context: setattr(connection, "context", self.tls)
            tls.sslobject_class = _handshakes(cut_off)
            self.config.ssl = tls

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def _handshakes(cut_off: CutOff) -> type[ssl.SSLObject]:
    """TLS connections that tell of a handshake that fails, which asyncio keeps to itself; from where, nobody knows."""

    class Handshake(ssl.SSLObject):
        def do_handshake(self) -> None:
            try:
                super().do_handshake()
            except (ssl.SSLWantReadError, ssl.SSLWantWriteError):
                raise
            except ssl.SSLError as error:
                cut_off(Problem("handshake", "TLS did not come about", detail=error.reason or str(error)), None)
                raise

    return Handshake


class Connection(HttpToolsProtocol):
    """A client's connection. Between two requests uvicorn ends it after IDLE_SECONDS; here it ends as well if there are
    too many, if headers are too long or take longer than `patience` seconds, or if a body that was refused goes on
    for so long."""

    def __init__(self, *args: Any, patience: float, most: int, cut_off: CutOff, **kwargs: Any) -> None:
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
        self._cut_off(problem, self.client[0] if self.client else None)
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
