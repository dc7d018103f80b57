"""The gateway as a process: listeners, signals, ready file, and a clean end."""

from __future__ import annotations

import asyncio
import socket
import ssl
import sys
import threading
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager, closing, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dfmcl.common.errors import BadInput, Broken
from dfmcl.common.tracing import Tracing, tracing
from dfmcl.serving.gateway.app import Gateway, Log
from dfmcl.serving.gateway.config import GatewayConfig, Tritons, load_config
from dfmcl.serving.gateway.doorstep import doorstep
from dfmcl.serving.gateway.endpoints import Security
from dfmcl.serving.gateway.exchange import say
from dfmcl.serving.gateway.listener import ADMIN_CONNECTIONS, Listener, affordable, bind, tls_context, url_of
from dfmcl.serving.gateway.pool import Pool
from dfmcl.serving.gateway.renewal import WatchedFiles, renew
from dfmcl.serving.ready import claim_ready, write_ready

STOP_POLL_SECONDS = 0.05
SWITCH_SECONDS = 0.0005  # after which decoders and detectors let go of the interpreter; 5 ms were many times an answer


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
        traces = stack.enter_context(closing(found)) if (found := tracing("dfmcl-gateway")) else None
        asyncio.run(_Service(config, source, public, admin, tls, decoders, stop, ready_file, log, traces).run())
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
    traces: Tracing | None

    async def run(self) -> None:
        """Until `stop`."""
        triton = self.config.triton
        pool = Pool(
            triton.endpoints,
            triton.model,
            security=_security(triton),
            check_seconds=triton.check_seconds,
            log=self.log,
            traces=self.traces,
        )
        async with pool, AsyncExitStack() as stack:
            gateway = Gateway(self.config, pool, self.decoders, self.log, self.traces)
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
            doorstep(self.config, gateway),
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

    def _sources(self, gateway: Gateway, pool: Pool, server: Listener) -> list[WatchedFiles]:
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
        sources = [WatchedFiles("listen", files, certificates), WatchedFiles("triton", towards, security)]
        if self.source is not None:
            path = self.source
            sources.append(WatchedFiles("keys", [path], lambda: gateway.renew(load_config(path))))
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
