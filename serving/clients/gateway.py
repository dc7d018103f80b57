"""A client of the gateway: numpy in, logits or labels out, as any customer would ask. It repeats nothing by itself; and
where the gateway said when to come back (Retry-After), the next request waits until then, or is not sent at all.

with GatewayClient("http://127.0.0.1:8080", "digits", key=key, logits=True) as client:
    answer = client.predict(images)  # uint8 (N, H, W, C) -> answer.logits float32 (N, K), answer.version
"""

from __future__ import annotations

import json
import re
import time
from typing import Any

import numpy as np
import numpy.typing as npt

from dfmcl.common.errors import AnswerError, Rejected, Unavailable
from dfmcl.serving.clients.connection import HttpClient, HttpConnection
from dfmcl.serving.clients.triton import Answer

LONGEST_RETRY_SECONDS = 3600.0  # believed of a stranger


class GatewayClient(HttpClient):
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
        self._connection = HttpConnection(url, ca=ca)
        self.url, self.model, self.classes, self.logits = url, model, classes, logits
        self._headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
        self._headers["X-Request-Timeout-Ms"] = str(max(1, int(1000 * timeout_seconds)))
        self._path = "/v1/classify" + ("?logits=true" if logits else "")
        self._timeout = timeout_seconds
        self._not_before, self._told = float("-inf"), ""  # when to come back, of time.monotonic(), and what was said

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
        response = self._connection.post(self._path, body, self._headers, seconds=self._timeout, where=self._where)
        try:
            return response.answer(self._where)
        except AnswerError as error:
            if response.status in (429, 503) and re.fullmatch("[0-9]+", response.again):
                pause = min(float(response.again[:9]), LONGEST_RETRY_SECONDS)
                self._not_before, self._told = time.monotonic() + pause, error.reason
            raise
