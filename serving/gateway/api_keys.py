"""API keys: who asks, which models each sees, and how many images it may send. Only digests of keys are kept."""

from __future__ import annotations

import hashlib
import hmac
import math
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from dfmcl.serving.gateway.problems import Problem

PREFIX = "dfmcl_"  # lets secret scanners find a key that was committed somewhere


def make_key() -> str:
    """A random key of 256 bits."""
    return PREFIX + secrets.token_urlsafe(32)


def digest_of(key: str) -> str:
    """What the configuration keeps of a key. A plain SHA-256 is enough: nobody can guess 256 random bits."""
    return hashlib.sha256(key.encode()).hexdigest()


class Bucket:
    """A token bucket of images: `burst` at once, `rate` a second in the long run. A request is let in while there is a
    token, and may take more than there are: a whole batch passes, and the next one waits until it is paid for."""

    def __init__(self, rate: float, burst: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._rate, self._burst, self._clock = rate, burst, clock
        self._tokens, self._seen = float(burst), clock()
        self._slowed = (rate, self._seen)  # a lower rate, and until when; one value, as another thread may set it

    def take(self, images: int = 1) -> float:
        """Take as many tokens and return 0, or leave all as it is and return the seconds until there is one."""
        now, (low, until) = self._clock(), self._slowed
        slow = max(0.0, min(now, until) - self._seen)
        self._tokens = min(self._burst, self._tokens + slow * low + (now - self._seen - slow) * self._rate)
        self._seen = now
        if self._tokens >= 1:
            self._tokens -= images
            return 0.0
        missing, slow = 1 - self._tokens, max(0.0, until - now)
        return missing / low if missing <= slow * low else slow + (missing - slow * low) / self._rate

    def correct(self, images: int) -> None:
        """Take so many more, or, below 0, give them back: a request held others than its headers promised."""
        self._tokens = min(self._burst, self._tokens - images)

    def slow(self, rate: float, seconds: float) -> None:
        """Give no more than `rate` a second from now on, for so long. May be called by any thread."""
        self._slowed = (min(rate, self._rate), self._clock() + seconds)


@dataclass(frozen=True)
class Caller:
    """Who asks. logits: may see raw ones; canary: our own probe, which gives way and counts apart.

    detect: whether its images are looked at for attacks; probe: what a canary sends, "benign", "attack" or "" (other).
    """

    name: str
    logits: bool = False
    canary: bool = False
    detect: bool = True
    probe: str = ""
    bucket: Bucket | None = field(default=None, compare=False)

    def spend(self, images: int) -> None:
        """Charge for a request's images; a Problem where there were too many before."""
        if self.bucket and (wait := self.bucket.take(images)):
            raise Problem(
                "rate_limited",
                f"key {self.name!r} may not send more images now; see Retry-After",
                retry_seconds=math.ceil(wait),
            )

    def correct(self, images: int) -> None:
        """Charge for so many more, or less where it is below 0."""
        if self.bucket:
            self.bucket.correct(images)


ANYONE = Caller("anyone")


class Keyring:
    """The callers by the digest of their key; an open one knows only `ANYONE`, and asks for nothing."""

    def __init__(self, callers: Sequence[tuple[str, Caller]], *, open_to_all: bool = False) -> None:
        """callers: (SHA-256 of the key in hex, caller)."""
        self._callers, self._open = tuple(callers), open_to_all

    def bucket(self, digest: str) -> Bucket | None:
        """Of the key with this digest."""
        return next((caller.bucket for known, caller in self._callers if known == digest), None)

    def caller(self, headers: Mapping[str, str]) -> Caller:
        """Whose key the headers carry; a Problem where they carry none that is known."""
        if self._open:
            return ANYONE
        scheme, _, token = headers.get("authorization", "").partition(" ")
        key = token.strip() if scheme.lower() == "bearer" else headers.get("x-api-key", "")
        if not key:
            raise Problem("unauthorized", "send an API key as Authorization: Bearer KEY, or as X-API-Key")
        digest, found = digest_of(key), None
        for known, caller in self._callers:  # all of them, so that the time tells nothing
            if hmac.compare_digest(digest, known):
                found = caller
        if found is None:
            raise Problem("unauthorized", "this API key is not known here")
        return found
