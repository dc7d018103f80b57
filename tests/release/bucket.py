"""Objects in memory, with the means of S3, GCS and Azure and no others, whose client may die at any of its writes.

A bucket cannot rename, writes one object at a time, on the condition that there is none or that it is still as it was
seen, and lists what was written at once.
"""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from dfmcl.common.reader import Unfit
from dfmcl.release.stores.bucket import BucketStore
from dfmcl.release.stores.store import Changed, Etag, Store, UnusableStore


class Died(BaseException):
    """The process has ended, as by kill -9: whatever still runs in it changes nothing."""


@dataclass
class Objects:
    """One process's client of a bucket. held: bytes by key, which the processes share; left: writes until it dies;
    requests: so many it made; away: whether it cannot be asked now."""

    held: dict[str, bytes] = field(default_factory=dict)
    left: float = float("inf")
    requests: int = 0
    address: str = "memory://bucket"
    away: bool = False

    def get(self, key: str, most: int, known: Etag | None = None) -> tuple[Etag, bytes] | None:
        self._ask()
        data, etag = self._data(key), self._etag(key)
        if len(data) > most:
            raise Unfit("is too large")
        return None if etag == known else (etag, data)

    def fetch(self, key: str, path: Path) -> None:
        self._ask()
        path.write_bytes(self._data(key))

    def put(self, key: str, body: bytes, seen: Etag | None) -> Etag:
        self._write()
        if (self._etag(key) if key in self.held else None) != seen:
            raise Changed(key)
        self.held[key] = body
        return self._etag(key)

    def create(self, key: str, body: bytes | Path) -> None:
        self._write()
        self.held[key] = body if isinstance(body, bytes) else body.read_bytes()

    def delete(self, keys: Iterable[str]) -> None:
        for key in keys:
            self._write()
            self.held.pop(key, None)

    def listing(self, prefix: str) -> Iterator[tuple[str, float]]:
        """All were written in 1970."""
        self._ask()
        yield from [(key, 0.0) for key in self.held if key.startswith(prefix)]

    def _data(self, key: str) -> bytes:
        if key not in self.held:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), key)
        return self.held[key]

    def _etag(self, key: str) -> Etag:
        """A digest, as S3 has it: the same bytes have the same."""
        return hashlib.sha256(self.held[key]).hexdigest()

    def _ask(self) -> None:
        self.requests += 1
        if self.away:
            raise UnusableStore(self.address, "the network is down")

    def _write(self) -> None:
        self._ask()
        self.left -= 1
        if self.left < 0:
            raise Died


def bucket_of(store: Store) -> BucketStore:
    """The store, which is known to be a bucket here."""
    assert isinstance(store, BucketStore)
    return store
