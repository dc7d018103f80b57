"""A client of the gateway: numpy in, logits or labels out, as any customer would ask. No retries.

with GatewayClient("http://127.0.0.1:8080", "digits", key=key, logits=True) as client:
    answer = client.predict(images)  # uint8 (N, H, W, C) -> answer.logits float32 (N, K), answer.version
"""

from __future__ import annotations

import http.client
import json
import ssl
from types import TracebackType
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import numpy.typing as npt

from serving.client import Answer
from serving.errors import AnswerError, BadInput, DeadlineExceeded, Rejected, Unavailable

# What a status means for whoever measures; others below 500 are refusals.
BY_STATUS: dict[int, tuple[type[AnswerError], str]] = {
    408: (DeadlineExceeded, "timeout"),
    429: (Unavailable, "queue_full"),
    502: (Rejected, "bad_output"),
    503: (Unavailable, "unavailable"),
    504: (DeadlineExceeded, "timeout"),
}


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
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise BadInput(f"url {url!r}: expected http://host:port of a gateway")
        self.url, self.model, self.classes, self.logits = url, model, classes, logits
        self._headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
        self._headers["X-Request-Timeout-Ms"] = str(max(1, int(1000 * timeout_seconds)))
        self._path = f"{parts.path.rstrip('/')}/v1/classify" + ("?logits=true" if logits else "")
        self._timeout = timeout_seconds
        self._connection: http.client.HTTPConnection
        if parts.scheme == "https":
            context = ssl.create_default_context(cafile=ca or None)
            self._connection = http.client.HTTPSConnection(
                parts.hostname, parts.port, timeout=timeout_seconds, context=context
            )
        else:
            self._connection = http.client.HTTPConnection(parts.hostname, parts.port, timeout=timeout_seconds)

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

        Unavailable, DeadlineExceeded or Rejected where there is no answer that can be used.
        """
        tensor = {"name": "images", "datatype": "UINT8", "shape": images.shape, "data": images.ravel().tolist()}
        body = self._post(json.dumps({"inputs": [tensor]}, separators=(",", ":")).encode())
        try:
            rows = [self._row(prediction) for prediction in body["predictions"]]
            logits = np.asarray(rows, np.float32).reshape(len(rows), -1)
            answer = Answer(logits, str(body["version"]))
        except (KeyError, TypeError, ValueError, IndexError) as error:
            raise Rejected(f"{self._where}: its answer cannot be read: {error!r}", "bad_output") from None
        if answer.logits.shape != (len(images), self.classes) or not np.isfinite(answer.logits).all():
            expected = (len(images), self.classes)
            raise Rejected(f"{self._where}: expected finite logits {expected}, received {logits.shape}", "bad_output")
        return answer

    @property
    def _where(self) -> str:
        return f"model {self.model!r} at {self.url}"

    def _row(self, prediction: dict[str, Any]) -> list[float]:
        if self.logits:
            return [float(value) for value in prediction["logits"]]
        row = [0.0] * self.classes
        row[int(prediction["index"])] = 1.0
        return row

    def _post(self, body: bytes) -> Any:
        try:
            self._connection.request("POST", self._path, body, self._headers)
            response = self._connection.getresponse()
            data = response.read()
        except TimeoutError:
            self.close()
            raise DeadlineExceeded(f"{self._where}: no answer within {self._timeout:g} s", "timeout") from None
        except (OSError, http.client.HTTPException) as error:
            self.close()
            reason = getattr(error, "strerror", None) or type(error).__name__
            raise Unavailable(f"{self._where}: no connection: {reason}", "unavailable") from None
        try:
            parsed = json.loads(data)
        except ValueError:
            raise Rejected(f"{self._where}: {response.status}, and no JSON", "bad_output") from None
        if response.status == 200:
            return parsed
        problem = parsed.get("error", {}) if isinstance(parsed, dict) else {}
        message = f"{self._where}: {response.status} {problem.get('reason', '')}: {problem.get('message', '')}"
        if problem.get("reason") == "overloaded":
            raise Unavailable(message, "queue_full")
        default = (Unavailable, "internal") if response.status >= 500 else (Rejected, "invalid")
        kind, reason = BY_STATUS.get(response.status, default)
        raise kind(message, reason)
