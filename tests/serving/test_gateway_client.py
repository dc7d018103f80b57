"""The client of the gateway against whatever may stand behind a URL: bounded, in time, and with a reason for each."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import numpy as np
import pytest

from dfmcl.common.errors import AnswerError, BadInput
from dfmcl.serving.clients import connection
from dfmcl.serving.clients.gateway import GatewayClient

IMAGES = np.zeros((2, 4, 4, 3), np.uint8)
GOOD = {"version": "1", "predictions": [{"index": 0, "logits": [1.0, 0.0]}, {"index": 1, "logits": [0.0, 1.0]}]}
Answer = tuple[int, bytes]
asked_at: list[float] = []  # when a door was asked


@pytest.fixture
def door() -> Iterator[Callable[[Answer], str]]:
    """`door((status, body))` starts a server that answers so; its URL."""
    servers: list[ThreadingHTTPServer] = []

    def start(answer: Answer, pause: float = 0.0, again: str = "") -> str:
        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                self.rfile.read(int(self.headers["Content-Length"]))
                self.send_response(answer[0])
                asked_at.append(time.monotonic())
                self.send_header("Content-Length", str(len(answer[1])))
                if again:
                    self.send_header("Retry-After", again)
                self.end_headers()
                for byte in answer[1] if pause else ():
                    self.wfile.write(bytes([byte]))
                    self.wfile.flush()
                    time.sleep(pause)  # a drip
                self.wfile.write(b"" if pause else answer[1])

            def log_message(self, format: str, *arguments: object) -> None:
                """Quiet."""

        servers.append(ThreadingHTTPServer(("127.0.0.1", 0), Handler))
        Thread(target=servers[-1].serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{servers[-1].server_port}"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def asked(url: str, *, logits: bool = True, seconds: float = 5.0, times: int = 1) -> list[list[float]]:
    with GatewayClient(url, "m", classes=2, logits=logits, timeout_seconds=seconds) as client:
        return [client.predict(IMAGES).logits.tolist() for _ in range(times)][-1]


def test_connection_is_kept(door: Callable[..., str]) -> None:
    """Several answers over one connection, by scores and by labels."""
    url = door((200, json.dumps(GOOD).encode()))
    assert asked(url, times=3) == [[1.0, 0.0], [0.0, 1.0]]
    assert asked(url, logits=False, times=3) == [[1.0, 0.0], [0.0, 1.0]]


@pytest.mark.parametrize(
    ("answer", "reason"),
    {
        "a proxy's page": ((503, b"<html>upstream</html>"), "unavailable"),
        "a proxy's JSON": ((503, b'{"error": "upstream connect error"}'), "unavailable"),
        "error is null": ((503, b'{"error": null}'), "unavailable"),
        "too often, in plain text": ((429, b"slow down"), "queue_full"),
        "overloaded": ((503, b'{"error": {"reason": "overloaded", "message": "too many"}}'), "queue_full"),
        "too late": ((504, b"{}"), "timeout"),
        "a bug there": ((500, b"{}"), "internal"),
        "no such key": ((401, b"{}"), "invalid"),
        "no JSON": ((200, b"hello"), "bad_output"),
        "a list": ((200, b"[1]"), "bad_output"),
        "deep": ((200, b"[" * 100_000), "bad_output"),
        "a number that is none": ((200, b'{"version": "1", "predictions": [{"logits": [1e999, 0]}]}'), "bad_output"),
        "a huge integer": (
            (200, b'{"version": "1", "predictions": [{"logits": [1' + b"0" * 400 + b", 0]}]}"),
            "bad_output",
        ),
        "predictions are text": ((200, b'{"version": "1", "predictions": "no"}'), "bad_output"),
        "one row too few": ((200, b'{"version": "1", "predictions": [{"logits": [1, 0]}]}'), "bad_output"),
    }.items(),
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_each_answer_has_its_reason(door: Callable[..., str], answer: str, reason: tuple[Answer, str]) -> None:
    """Whatever comes back is one line with a reason; the status decides before the body."""
    given, expected = reason
    with pytest.raises(AnswerError) as caught:
        asked(door(given))
    assert caught.value.reason == expected
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize("index", [-1, 2, 1.9, "1", None])
def test_a_label_that_is_none_is_refused(door: Callable[..., str], index: object) -> None:
    """A class beyond the last, or between two, is no answer."""
    body = {"version": "1", "predictions": [{"index": index}, {"index": 0}]}
    with pytest.raises(AnswerError) as caught:
        asked(door((200, json.dumps(body).encode())), logits=False)
    assert caught.value.reason == "bad_output"


def test_an_answer_that_drips_is_late(door: Callable[..., str]) -> None:
    """The deadline is for the whole answer, not for each byte."""
    begun = time.monotonic()
    with pytest.raises(AnswerError) as caught:
        asked(door((200, b" " * 200), 0.05), seconds=0.5)
    assert caught.value.reason == "timeout"
    assert time.monotonic() - begun < 5


def test_an_answer_without_end_is_cut(door: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody fills our memory."""
    monkeypatch.setattr(connection, "ANSWER", 1000)
    with pytest.raises(AnswerError, match="longer than 1000 bytes"):
        asked(door((200, b" " * 5000)))


@pytest.mark.parametrize("url", ["ftp://h", "http://", "http://h:99999", "http://user:secret@h"])
def test_urls_that_cannot_be_are_bad_input(url: str) -> None:
    """Said at once, without the password."""
    with pytest.raises(BadInput) as caught:
        GatewayClient(url, "m", classes=2)
    assert "secret" not in str(caught.value)


def test_an_authority_that_is_no_file_is_bad_input() -> None:
    """At the start, not in each round."""
    with pytest.raises(BadInput, match="name a PEM file"):
        GatewayClient("https://h", "m", classes=2, ca="/no/such.pem")


@pytest.mark.parametrize("status", [429, 503])
def test_next_request_waits_as_long_as_it_was_told(door: Callable[..., str], status: int) -> None:
    """Nothing is repeated by itself; the next request comes no earlier than Retry-After, past its timeout never."""
    with GatewayClient(door((status, b"{}"), again="1"), "m", classes=2, timeout_seconds=3) as client:
        asked_at.clear()
        for _ in range(2):
            with pytest.raises(AnswerError):
                client.predict(IMAGES)
        assert len(asked_at) == 2
        assert asked_at[1] - asked_at[0] >= 0.95
    with GatewayClient(door((status, b"{}"), again="1000"), "m", classes=2, timeout_seconds=3) as client:
        asked_at.clear()
        with pytest.raises(AnswerError) as first:
            client.predict(IMAGES)
        with pytest.raises(AnswerError, match="come back in 1000 s more") as second:
            client.predict(IMAGES)
        assert (len(asked_at), second.value.reason) == (1, first.value.reason)


@pytest.mark.parametrize("again", ["soon", "-1", "Wed, 21 Oct 2099 07:28:00 GMT", "1.5", "²"])
def test_retry_after_that_is_no_number_of_seconds_is_ignored(door: Callable[..., str], again: str) -> None:
    """A proxy's words must not stop a client."""
    with GatewayClient(door((503, b"{}"), again=again), "m", classes=2, timeout_seconds=3) as client:
        asked_at.clear()
        for _ in range(2):
            with pytest.raises(AnswerError):
                client.predict(IMAGES)
        assert len(asked_at) == 2
