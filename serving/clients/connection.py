"""One HTTP connection to a gateway: bounded, in time, and with a reason for each answer that is none."""

from __future__ import annotations

import http.client
import ssl
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from dfmcl.common.errors import AnswerError, BadInput, DeadlineExceeded, Rejected, Unavailable
from dfmcl.common.reader import Unfit, parse_json
from dfmcl.serving.clients.closing import Closing

# The meaning of a status for a measurement; others below 500 are refusals.
BY_STATUS: dict[int, tuple[type[AnswerError], str]] = {
    408: (DeadlineExceeded, "timeout"),
    429: (Unavailable, "queue_full"),
    502: (Rejected, "bad_output"),
    503: (Unavailable, "unavailable"),
    504: (DeadlineExceeded, "timeout"),
}
ANSWER = 4_000_000  # bytes; 64 images with the logits of 1,000 classes need a third of it
MESSAGE = 300  # characters of a stranger's words that go into a log


@dataclass(frozen=True)
class Response:
    """again: the header Retry-After, "" where there is none."""

    status: int
    data: bytes
    again: str

    def answer(self, where: str) -> dict[str, Any]:
        """The JSON object of a 200; an AnswerError with its reason otherwise. where: who was asked, for messages."""
        try:
            parsed = parse_json(self.data)
        except Unfit:
            parsed = None
        if self.status == 200 and isinstance(parsed, dict):
            return parsed
        if self.status == 200:
            raise Rejected(f"{where}: answered 200 without a JSON object", "bad_output")
        problem = parsed.get("error") if isinstance(parsed, dict) else None
        reason, message = (
            (str(problem.get(key, "")) for key in ("reason", "message")) if isinstance(problem, dict) else ("", "")
        )
        text = f"{where}: {self.status} {reason}: {message}"[:MESSAGE]
        default = (Unavailable, "internal") if self.status >= 500 else (Rejected, "invalid")
        kind, why = (Unavailable, "queue_full") if reason == "overloaded" else BY_STATUS.get(self.status, default)
        raise kind(text, why)


class HttpConnection:
    """A connection that is kept, and opened again where it broke. Not for several threads at a time."""

    def __init__(self, url: str, *, ca: str = "") -> None:
        """url: http(s)://host:port, with a path where the gateway is below one; ca: file of the authority to believe,
        "" for the system's. BadInput where one of them cannot be."""
        try:
            parts = urlsplit(url)
            port = parts.port
        except ValueError:
            raise BadInput("url: its port is no port; expected http://host:port of a gateway") from None
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise BadInput(f"url {url!r}: expected http://host:port of a gateway")
        if "@" in parts.netloc:
            raise BadInput("url: leave out user and password, which would stand in logs; a key goes into key")
        self._root = parts.path.rstrip("/")
        self._connection: http.client.HTTPConnection
        if parts.scheme == "https":
            try:
                context = ssl.create_default_context(cafile=ca or None)
            except OSError as error:
                raise BadInput(f"ca {ca}: {error.strerror or 'holds no certificate'}; name a PEM file") from None
            self._connection = http.client.HTTPSConnection(parts.hostname, port, context=context)
        else:
            self._connection = http.client.HTTPConnection(parts.hostname, port)

    def close(self) -> None:
        """Close the connection; the next request opens a new one."""
        self._connection.close()

    def post(self, path: str, body: bytes, headers: Mapping[str, str], *, seconds: float, where: str) -> Response:
        """The answer, which has so many seconds as a whole, and a bounded length; an AnswerError where none came.

        where: who is asked, for messages.
        """
        deadline, connection = time.monotonic() + seconds, self._connection
        connection.timeout = seconds
        if connection.sock is not None:
            connection.sock.settimeout(seconds)
        try:
            connection.request("POST", self._root + path, body, dict(headers))
            response = connection.getresponse()
            data = b""
            while part := response.read1(65_536):
                data += part
                if len(data) > ANSWER:
                    self.close()
                    raise Rejected(f"{where}: its answer is longer than {ANSWER} bytes", "bad_output")
                if time.monotonic() > deadline:
                    raise TimeoutError
            if response.length:
                raise http.client.IncompleteRead(data)
            response.close()  # of the answer, not of the connection, which the next request may use
        except TimeoutError:
            self.close()
            raise DeadlineExceeded(f"{where}: no answer within {seconds:g} s", "timeout") from None
        except (OSError, http.client.HTTPException, ValueError) as error:
            self.close()
            reason = getattr(error, "strerror", None) or type(error).__name__
            raise Unavailable(f"{where}: no connection: {reason}", "unavailable") from None
        return Response(response.status, data, response.headers.get("retry-after", ""))


class HttpClient(Closing):
    """A client that has one HTTP connection."""

    _connection: HttpConnection

    def close(self) -> None:
        """Close the connection; the next request opens a new one."""
        self._connection.close()
