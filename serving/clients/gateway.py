"""A client of the gateway: numpy in, logits or labels out, as any customer would ask. It repeats nothing by itself; and
where the gateway said when to come back (Retry-After), the next request waits until then, or is not sent at all.

with GatewayClient("http://127.0.0.1:8080", "digits", key=key, logits=True) as client:
    answer = client.predict(images)  # uint8 (N, H, W, C) -> answer.logits float32 (N, K), answer.version
"""

from __future__ import annotations

import http.client
import json
import re
import ssl
import time
from types import TracebackType
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import numpy.typing as npt

from dfmcl.common.errors import AnswerError, BadInput, DeadlineExceeded, Rejected, Unavailable
from dfmcl.common.reader import Unfit, parse_json
from dfmcl.serving.clients.triton import Answer

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
LONGEST_RETRY_SECONDS = 3600.0  # believed of a stranger


class GatewayClient:
    """One model behind one gateway, over one connection that is kept. Not for several threads at a time."""

    def __init__(
        self,
        url: str,
        model: str,
        *,
        classes: int,
        key: str = "",
        logits: bool = False,
        timeout_seconds: float = 5.0,
        ca: str = "",
    ) -> None:
        """url: http(s)://host:port; key: an API key, "" where the gateway is open; logits: ask for them, which the key
        must allow; else the logits of an answer are 1 for the label and 0 for others. ca: file of the authority to
        believe, "" for the system's."""
        try:
            parts = urlsplit(url)
            port = parts.port
        except ValueError:
            raise BadInput("url: its port is no port; expected http://host:port of a gateway") from None
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise BadInput(f"url {url!r}: expected http://host:port of a gateway")
        if "@" in parts.netloc:
            raise BadInput("url: leave out user and password, which would stand in logs; a key goes into key")
        self.url, self.model, self.classes, self.logits = url, model, classes, logits
        self._headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
        self._headers["X-Request-Timeout-Ms"] = str(max(1, int(1000 * timeout_seconds)))
        self._path = f"{parts.path.rstrip('/')}/v1/classify" + ("?logits=true" if logits else "")
        self._timeout = timeout_seconds
        self._not_before, self._told = float("-inf"), ""  # when to come back, of time.monotonic(), and what was said
        self._connection: http.client.HTTPConnection
        if parts.scheme == "https":
            try:
                context = ssl.create_default_context(cafile=ca or None)
            except OSError as error:
                raise BadInput(f"ca {ca}: {error.strerror or 'holds no certificate'}; name a PEM file") from None
            self._connection = http.client.HTTPSConnection(
                parts.hostname, port, timeout=timeout_seconds, context=context
            )
        else:
            self._connection = http.client.HTTPConnection(parts.hostname, port, timeout=timeout_seconds)

    def __enter__(self) -> GatewayClient:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection; the next request opens a new one."""
        self._connection.close()

    def predict(self, images: npt.NDArray[np.uint8]) -> Answer:
        """Logits of images, uint8 (N, H, W, C), N >= 1 and at most the model's largest batch, in one request.

        Unavailable, DeadlineExceeded or Rejected where there is no answer that can be used. After an answer with
        Retry-After it waits so long first; Unavailable at once where that is longer than its timeout.
        """
        self._wait()
        tensor = {"name": "images", "datatype": "UINT8", "shape": images.shape, "data": images.ravel().tolist()}
        body = self._post(json.dumps({"inputs": [tensor]}, separators=(",", ":")).encode())
        try:
            rows = [self._row(prediction) for prediction in body["predictions"]]
            logits = np.asarray(rows, np.float32).reshape(len(rows), -1)
            answer = Answer(logits, str(body["version"]))
        except (KeyError, TypeError, ValueError, IndexError, ArithmeticError, AttributeError) as error:
            raise Rejected(f"{self._where}: its answer cannot be read: {type(error).__name__}", "bad_output") from None
        if answer.logits.shape != (len(images), self.classes) or not np.isfinite(answer.logits).all():
            expected = (len(images), self.classes)
            raise Rejected(f"{self._where}: expected finite logits {expected}, received {logits.shape}", "bad_output")
        return answer

    @property
    def _where(self) -> str:
        return f"model {self.model!r} at {self.url}"

    def _wait(self) -> None:
        """Until the time that the gateway has named."""
        if (wait := self._not_before - time.monotonic()) >= self._timeout:
            raise Unavailable(f"{self._where}: not asked, as it said to come back in {wait:.0f} s more", self._told)
        time.sleep(max(0.0, wait))

    def _row(self, prediction: dict[str, Any]) -> list[float]:
        if self.logits:
            return [float(value) for value in prediction["logits"]]
        index = prediction["index"]
        if not isinstance(index, int) or not 0 <= index < self.classes:
            raise ValueError("index")
        return [float(index == place) for place in range(self.classes)]

    def _post(self, body: bytes) -> dict[str, Any]:
        status, data, again = self._exchange(body)
        try:
            parsed = parse_json(data)
        except Unfit:
            parsed = None
        if status == 200 and isinstance(parsed, dict):
            return parsed
        if status == 200:
            raise Rejected(f"{self._where}: answered 200 without a JSON object", "bad_output")
        problem = parsed.get("error") if isinstance(parsed, dict) else None
        reason, message = (
            (str(problem.get(key, "")) for key in ("reason", "message")) if isinstance(problem, dict) else ("", "")
        )
        text = f"{self._where}: {status} {reason}: {message}"[:MESSAGE]
        default = (Unavailable, "internal") if status >= 500 else (Rejected, "invalid")
        kind, why = (Unavailable, "queue_full") if reason == "overloaded" else BY_STATUS.get(status, default)
        if status in (429, 503) and re.fullmatch("[0-9]+", again):
            pause = min(float(again[:9]), LONGEST_RETRY_SECONDS)
            self._not_before, self._told = time.monotonic() + pause, why
        raise kind(text, why)

    def _exchange(self, body: bytes) -> tuple[int, bytes, str]:
        """Status, body and Retry-After of the answer, which has the deadline as a whole, and a bounded length."""
        deadline = time.monotonic() + self._timeout
        try:
            self._connection.request("POST", self._path, body, self._headers)
            response = self._connection.getresponse()
            data = b""
            while part := response.read1(65_536):
                data += part
                if len(data) > ANSWER:
                    self.close()
                    raise Rejected(f"{self._where}: its answer is longer than {ANSWER} bytes", "bad_output")
                if time.monotonic() > deadline:
                    raise TimeoutError
            if response.length:
                raise http.client.IncompleteRead(data)
            response.close()  # of the answer, not of the connection, which the next request may use
        except TimeoutError:
            self.close()
            raise DeadlineExceeded(f"{self._where}: no answer within {self._timeout:g} s", "timeout") from None
        except (OSError, http.client.HTTPException, ValueError) as error:
            self.close()
            reason = getattr(error, "strerror", None) or type(error).__name__
            raise Unavailable(f"{self._where}: no connection: {reason}", "unavailable") from None
        return response.status, data, response.headers.get("retry-after", "")
