"""A client for people's programs: image files in, labels out, through a gateway, with retries that are safe.

with ImageClient("http://127.0.0.1:8080") as client:  # the key: an argument, or DFMCL_API_KEY
    for found in client.classify([Path("a.jpg"), png_bytes], resize=True).results:
        print(found.label if isinstance(found, Prediction) else found.message)

To classify changes nothing, so a request may be repeated: where the gateway says to come back (429, 503), and where the
connection broke. Each try is charged. What another try would not mend (a bad image, an unknown key) is told at once.
"""

from __future__ import annotations

import email.utils
import os
import random
import re
import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dfmcl.common.errors import AnswerError, BadInput, DeadlineExceeded, Rejected, Unavailable
from dfmcl.serving.clients.connection import HttpClient, HttpConnection

KEY_VARIABLE = "DFMCL_API_KEY"
AGAIN = (429, 503)  # the gateway has done nothing yet, and says so


@dataclass(frozen=True)
class Patience:
    """How long, and how often. seconds: for all tries together; attempts: at most so many.

    longest_wait: seconds of a Retry-After that is waited for; where it asks for more, the error comes at once.
    first_pause: before the second try where nothing is said, twice as long before each further one, times a random
    share, so that many clients do not come back at the same moment.
    """

    seconds: float = 30.0
    attempts: int = 6
    longest_wait: float = 20.0
    first_pause: float = 0.1


@dataclass(frozen=True)
class Chance:
    """A class with the model's own share of belief, in [0, 1]."""

    label: str
    index: int
    probability: float


@dataclass(frozen=True)
class Prediction:
    """An image that was classified. top: best first; logits: in class order, () where they were not asked for."""

    label: str
    index: int
    top: tuple[Chance, ...]
    logits: tuple[float, ...] = ()


@dataclass(frozen=True)
class Unseen:
    """An image that could not be. reason: of the gateway's closed set."""

    reason: str
    message: str


@dataclass(frozen=True)
class Album:
    """Results in the order of the images; version: of the model; request_id: as it stands in the gateway's log."""

    results: tuple[Prediction | Unseen, ...]
    version: str
    request_id: str


class ImageClient(HttpClient):
    """One gateway, over one connection that is kept. Not for several threads at a time."""

    def __init__(
        self,
        url: str,
        *,
        key: str | None = None,
        ca: str = "",
        patience: Patience = Patience(),
        sleep: Callable[[float], None] = time.sleep,
        clock: Callable[[], float] = time.monotonic,
        chance: Callable[[], float] = random.random,
    ) -> None:
        """The connection is opened by the first request. BadInput where an argument cannot be.

        url: http(s)://host:port, with a path where the gateway is below one.
        key: an API key; None takes DFMCL_API_KEY from the environment, "" sends none.
        ca: file of the authority to believe, "" for the system's.
        patience: of each `classify`.
        sleep, clock: of time.
        chance: a random share in [0, 1).
        """
        key = os.environ.get(KEY_VARIABLE, "") if key is None else key
        if not re.fullmatch(r"[\x21-\x7e]*", key):
            raise BadInput(f"key (or {KEY_VARIABLE}): holds a character that no API key has")
        self._connection, self._url = HttpConnection(url, ca=ca), url
        self._headers = {"Authorization": f"Bearer {key}"} if key else {}
        self._patience, self._sleep, self._clock, self._chance = patience, sleep, clock, chance

    def classify(self, images: Sequence[bytes | Path], *, resize: bool = False, logits: bool = False) -> Album:
        """What the model sees in image files, in one request, which is repeated where that is of use.

        images: the files' bytes, or where they lie; resize: bring others to the size that the model takes; logits: ask
        for them too, which the key must allow. Unavailable, DeadlineExceeded or Rejected where no answer came within
        `patience`; BadInput where a file cannot be read.
        """
        if not images:
            raise BadInput("images: none were given")
        edge = secrets.token_hex(16)
        body = b"".join(_part(edge, _bytes_of(image)) for image in images) + f"--{edge}--\r\n".encode()
        flags = [name for name, wanted in (("resize", resize), ("logits", logits)) if wanted]
        path = "/v1/classify" + ("?" + "&".join(f"{name}=true" for name in flags) if flags else "")
        headers = {
            **self._headers,
            "Content-Type": f"multipart/form-data; boundary={edge}",
            "X-Request-Id": edge,  # of all tries, so that the log shows them together
        }
        answer = self._persist(path, body, headers)
        try:
            found = answer.get("predictions", [answer])  # one image comes as such
            album = Album(tuple(map(_result, found)), str(answer["version"]), str(answer["request_id"]))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise Rejected(f"{self._url}: its answer cannot be read: {type(error).__name__}", "bad_output") from None
        if len(album.results) != len(images):
            said = f"{len(album.results)} results for {len(images)} images"
            raise Rejected(f"{self._url}: answered with {said}", "bad_output")
        return album

    def _persist(self, path: str, body: bytes, headers: dict[str, str]) -> dict[str, Any]:
        deadline, pause = self._clock() + self._patience.seconds, self._patience.first_pause
        for attempt in range(1, self._patience.attempts + 1):
            left = deadline - self._clock()
            if left <= 0:
                raise DeadlineExceeded(f"{self._url}: no answer within {self._patience.seconds:g} s", "timeout")
            headers["X-Request-Timeout-Ms"] = str(max(1, int(1000 * left)))
            told: float | None = None
            try:
                response = self._connection.post(path, body, headers, seconds=left, where=self._url)
                if response.status not in AGAIN:
                    return response.answer(self._url)
                told = retry_after(response.again, time.time())
                response.answer(self._url)
            except Unavailable as error:
                wait = told if told is not None else pause * self._chance()
                self._require_worth(error, attempt, wait, deadline)
            self._sleep(wait)
            pause *= 2
        raise AssertionError("the last attempt returns or raises")

    def _require_worth(self, error: AnswerError, attempt: int, wait: float, deadline: float) -> None:
        """Raise the error where another try has no place: too often, too long a wait, or beyond the deadline."""
        patience = self._patience
        if attempt == patience.attempts or wait > patience.longest_wait or self._clock() + wait >= deadline:
            after = f"; after {attempt} tries" if attempt > 1 else ""
            later = f"; it says to come back in {wait:.0f} s" if wait > patience.longest_wait else ""
            raise type(error)(f"{error}{after}{later}", error.reason) from None


def retry_after(text: str, now: float) -> float | None:
    """Seconds that a Retry-After asks to wait, given so or as a date; None where it says neither. now: unix seconds."""
    if re.fullmatch("[0-9]{1,9}", text):
        return float(text)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(text).timestamp() - now)
    except (ValueError, TypeError, OverflowError):
        return None


def _result(entry: dict[str, Any]) -> Prediction | Unseen:
    if "error" in entry:
        return Unseen(str(entry["error"]["reason"]), str(entry["error"]["message"]))
    top = tuple(Chance(str(row["label"]), int(row["index"]), float(row["probability"])) for row in entry["top"])
    return Prediction(str(entry["label"]), int(entry["index"]), top, tuple(map(float, entry.get("logits", ()))))


def _bytes_of(image: bytes | Path) -> bytes:
    if isinstance(image, bytes):
        return image
    try:
        return image.read_bytes()
    except OSError as error:
        raise BadInput(f"{image}: cannot be read: {error.strerror or error}") from None


def _part(edge: str, image: bytes) -> bytes:
    head = f'--{edge}\r\nContent-Disposition: form-data; name="image"; filename="image"\r\n\r\n'
    return head.encode() + image + b"\r\n"
