"""What the gateway is tested with: a gateway in a thread, an HTTP client, and a relay that can freeze or break."""

from __future__ import annotations

import http.client
import io
import json
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
from PIL import Image

from dfmcl.serving.gateway import service as gateway
from dfmcl.serving.gateway.api_keys import digest_of
from dfmcl.serving.gateway.config import GatewayConfig

KEY, PRIVILEGED, CANARY = "dfmcl_of-a-user", "dfmcl_of-a-trusted-user", "dfmcl_of-the-canary"
PLENTY = {"images_per_second": 1e6, "burst_images": 1_000_000}
KEYS = [
    {"name": "shop", "sha256": digest_of(KEY), **PLENTY},
    {"name": "lab", "sha256": digest_of(PRIVILEGED), "logits": True, **PLENTY},
    {"name": "canary", "sha256": digest_of(CANARY), "canary": True, "logits": True, **PLENTY},
]


def settings(endpoints: list[str], **sections: Any) -> GatewayConfig:
    """A gateway's configuration: quick checks, no notice, three keys; sections replace or add to that."""
    table: dict[str, Any] = {
        "listen": {"port": 0, "notice_seconds": 0},
        "triton": {"endpoints": endpoints, "model": "digits", "check_seconds": 0.3},
        "keys": KEYS,
    }
    for name, value in sections.items():
        table[name] = table.get(name, {}) | value if isinstance(value, dict) else value
    return GatewayConfig.model_validate(table)


@dataclass(frozen=True)
class Answer:
    """A response, read to its end."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        """The body's content."""
        return json.loads(self.body)

    @property
    def reason(self) -> str:
        """Of a problem."""
        assert set(self.json) == {"error"}
        assert set(self.json["error"]) == {"reason", "message", "request_id"}
        return str(self.json["error"]["reason"])


@dataclass
class Door:
    """A gateway that runs in a thread: its address, its log, its exit code."""

    config: GatewayConfig
    tls: ssl.SSLContext | None = None
    source: Path | None = None
    log: list[dict[str, Any]] = field(default_factory=list)
    stop: threading.Event = field(default_factory=threading.Event)
    outcome: list[Any] = field(default_factory=list)

    def start(self) -> Door:
        """Returns when it listens; raises what `serve` raised."""
        self.thread = threading.Thread(target=self._serve)
        self.thread.start()
        while not (said := [entry["url"] for entry in self.log if entry["event"] == "listening"]):
            if self.outcome:
                raise self.outcome[0]
            time.sleep(0.01)  # it says so in its log
        self.url = said[0]
        self.port = urlsplit(self.url).port
        return self

    def administration(self) -> Door:
        """Its admin address."""
        (said,) = [entry["admin"] for entry in self.log if entry["event"] == "listening"]
        admin = Door(self.config)
        admin.port = urlsplit(said).port
        return admin

    def _serve(self) -> None:
        try:
            self.outcome.append(gateway.serve(self.config, stop=self.stop, source=self.source, log=self.log.append))
        except Exception as error:  # noqa: BLE001 - handed to the test's own thread
            self.outcome.append(error)

    def until_ready(self, seconds: float = 20) -> Door:
        """Returns when a Triton answers through it."""
        deadline = time.monotonic() + seconds
        while self.get("/readyz").status != 200:
            assert time.monotonic() < deadline, self.log
            time.sleep(0.01)  # asked over HTTP, as a load balancer does
        return self

    @property
    def address(self) -> str:
        """Where it is, for others."""
        return f"http://127.0.0.1:{self.port}"

    def connection(self, timeout: float = 20) -> http.client.HTTPConnection:
        """A connection of its own."""
        if self.tls is not None:
            return http.client.HTTPSConnection("127.0.0.1", self.port, timeout=timeout, context=self.tls)
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout)

    def ask(
        self,
        method: str,
        path: str,
        body: Any = None,
        headers: dict[str, str] | None = None,
        connection: http.client.HTTPConnection | None = None,
    ) -> Answer:
        """One request; over a connection of its own where none is given."""
        used = connection or self.connection()
        used.request(method, path, body, headers or {})
        response = used.getresponse()
        answer = Answer(response.status, {k.lower(): v for k, v in response.getheaders()}, response.read())
        if connection is None:
            used.close()
        return answer

    def get(self, path: str, **headers: str) -> Answer:
        """A GET."""
        return self.ask("GET", path, headers=headers)

    def classify(self, body: Any, *, key: str | None = PRIVILEGED, query: str = "", **headers: str) -> Answer:
        """A POST to /v1/classify; headers with _ for -."""
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        if key is not None:
            named["X-API-Key"] = key
        return self.ask("POST", f"/v1/classify{query}", body, named)

    def lines(self, event: str = "request") -> list[dict[str, Any]]:
        """What was logged of one kind, up to the last answer, whose line follows it."""
        if self.thread.is_alive():
            self.get("/healthz")  # answered by the same loop, after that line was written
        return [entry for entry in self.log if entry["event"] == event]

    def metric(self, series: str) -> float:
        """A series' value, such as `gateway_in_flight`."""
        values = dict(
            line.rsplit(" ", 1) for line in self.get("/metrics").body.decode().splitlines() if not line.startswith("#")
        )
        return float(values[series])

    def close(self) -> Any:
        """Stop it; what `serve` returned or raised."""
        self.stop.set()
        self.thread.join(60)
        return self.outcome[0]


@contextmanager
def opened(config: GatewayConfig, *, ready: bool = True, tls: ssl.SSLContext | None = None) -> Iterator[Door]:
    """A gateway for the length of a block, which must end well."""
    door = Door(config, tls).start()
    try:
        yield door.until_ready() if ready else door
    finally:
        outcome = door.close()
    assert outcome == 0


def encoded(pixels: np.ndarray, kind: str = "PNG", **options: Any) -> bytes:
    """An array as an image file; WebP without loss, so that any decoder finds the same pixels."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind, **({"lossless": True} if kind == "WEBP" else {}), **options)
    return file.getvalue()


class Relay:
    """A TCP port that leads to another, and can freeze, break off, or refuse, as networks do."""

    def __init__(self, target: str, port: int = 0) -> None:
        host, _, target_port = target.rpartition(":")
        self._target = (host, int(target_port))
        self._flowing = threading.Event()
        self._flowing.set()
        self._sockets: list[socket.socket] = []
        self.passed = bytearray()  # what came through on the way there
        self._listen(port)

    def _listen(self, port: int) -> None:
        self._listener = socket.create_server(("127.0.0.1", port))
        self.port = self._listener.getsockname()[1]
        self.url = f"127.0.0.1:{self.port}"
        threading.Thread(target=self._accept, args=(self._listener,), daemon=True).start()

    def freeze(self) -> None:
        """From now on nothing comes through, and nobody is told."""
        self._flowing.clear()

    def thaw(self) -> None:
        """What was held back comes through."""
        self._flowing.set()

    def break_off(self) -> None:
        """End all connections and refuse new ones."""
        # A thread that waits in accept() holds the socket open until it is woken.
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for end in self._sockets:
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()
        self._sockets.clear()

    def mend(self) -> None:
        """Accept connections again, at the same port."""
        self.thaw()
        self._listen(self.port)

    def __enter__(self) -> Relay:
        return self

    def __exit__(self, *error: object) -> None:
        self.thaw()
        with suppress(OSError):
            self.break_off()

    def _accept(self, listener: socket.socket) -> None:
        with suppress(OSError):  # the listener was closed, or nobody is at the target
            while True:
                near, _ = listener.accept()
                far = socket.create_connection(self._target)
                self._sockets += [near, far]
                for source, sink, record in ((near, far, self.passed), (far, near, bytearray())):
                    threading.Thread(target=self._pump, args=(source, sink, record), daemon=True).start()

    def _pump(self, source: socket.socket, sink: socket.socket, record: bytearray) -> None:
        with suppress(OSError):
            while data := source.recv(65536):
                self._flowing.wait()
                record += data
                sink.sendall(data)
        with suppress(OSError):
            sink.shutdown(socket.SHUT_RDWR)
