"""A bucket in memory, with the means of S3, GCS and Azure and no others, and the second member of `Store` on it.

A bucket has objects and no folders, cannot rename, writes one object at a time, on the condition that there is none or
that it is still as it was seen, and lists what was written at once. The tests of the seam are about this member's
promises; about a bucket of a cloud they say nothing.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import tempfile
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from dfmcl.common.errors import Broken
from dfmcl.common.reader import Unfit
from dfmcl.release.stores.store import Changed, Etag, Item

UNFINISHED = ".unfinished-"
LOCK = ".writer.lock"
LEASE_SECONDS = 60.0


class Died(BaseException):
    """The process has ended, as by kill -9: whatever still runs in it changes nothing."""


@dataclass
class Objects:
    """One process's client of a bucket. held: bytes by name, which the processes share; left: writes until it dies."""

    held: dict[str, bytes] = field(default_factory=dict)
    left: float = float("inf")

    def put(self, name: str, data: bytes, seen: Etag | None) -> Etag:
        """On the condition that the object is as it was seen, None: that there is none; Changed otherwise."""
        self._write()
        if (self.get(name)[0] if name in self.held else None) != seen:
            raise Changed(name)
        self.held[name] = data
        return self.get(name)[0]

    def delete(self, name: str) -> None:
        self._write()
        self.held.pop(name, None)

    def get(self, name: str) -> tuple[Etag, bytes]:
        """The etag is a digest, as S3 has it: the same bytes have the same."""
        return hashlib.sha256(self.held[name]).hexdigest(), self.held[name]

    def names(self, prefix: str = "") -> list[str]:
        return sorted(name for name in self.held if name.startswith(prefix))

    def _write(self) -> None:
        self.left -= 1
        if self.left < 0:
            raise Died


class Bucket:
    """A `Store` in a bucket.

    A folder that is written or removed is named by a marker first, an object beside it that lists the files to come; it
    is not there, to readers, while one of them is missing. So the last file of a folder is its commit. The next writer
    removes what is unfinished. That there is one writer is a lease; where one outlives its own, conditions refuse what
    it writes.
    """

    def __init__(self, objects: Objects, now: Callable[[], float] = lambda: 0.0) -> None:
        self.objects, self._now = objects, now
        self._copies = tempfile.TemporaryDirectory()
        self._copied: dict[str, Etag] = {}

    def where(self, name: str = "") -> str:
        return f"memory://bucket/{name}".rstrip("/")

    def entries(self, folder: str = "") -> list[Item]:
        prefix = f"{folder}/" if folder else ""
        rests = [name.removeprefix(prefix).partition("/") for name in self._visible(prefix)]
        if folder and not rests:
            raise self._absent(folder)
        kinds = {head: bool(slash) for head, slash, _ in rests}
        return [Item(head, folder=inner, file=not inner) for head, inner in sorted(kinds.items())]

    def read(self, name: str, most: int) -> bytes:
        data = self._get(name)[1]
        if len(data) > most:
            raise Unfit(f"holds {len(data):,} bytes or more, and at most {most:,} are read")
        return data

    def etag(self, name: str) -> Etag:
        return self._get(name)[0]

    def local(self, folder: str) -> Path:
        place, there = Path(self._copies.name), self._visible(f"{folder}/" if folder else "")
        for gone in [name for name in self._copied if name.startswith(f"{folder}/") and name not in there]:
            (place / gone).unlink()
            del self._copied[gone]
        if not there:
            shutil.rmtree(place / folder, ignore_errors=True)
        for name in there:
            etag, data = self.objects.get(name)
            if self._copied.get(name) != etag:
                (place / name).parent.mkdir(parents=True, exist_ok=True)
                (place / name).write_bytes(data)
                self._copied[name] = etag
        return place / folder

    @contextmanager
    def writing(self) -> Iterator[None]:
        lease = self._lease()
        for marker, folder in self._markers():
            if folder in self._unfinished():
                self._delete(folder)
            self.objects.delete(marker)
        try:
            yield
        finally:
            if LOCK in self.objects.held and self.objects.get(LOCK)[0] == lease:  # else another writer's
                self.objects.delete(LOCK)

    @contextmanager
    def added(self, folder: str) -> Iterator[Path]:
        with tempfile.TemporaryDirectory() as temporary:
            yield Path(temporary)
            if self._visible(f"{folder}/"):
                raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), self.where(folder))
            paths = [path.relative_to(temporary) for path in Path(temporary).rglob("*") if path.is_file()]
            paths.sort(key=lambda path: (len(path.parts) == 1, path))
            marker = _marker_of(folder)
            self.objects.put(marker, json.dumps([str(path) for path in paths]).encode(), None)
            for path in paths:
                self.objects.put(f"{folder}/{path}", (Path(temporary) / path).read_bytes(), None)
            self.objects.delete(marker)

    @contextmanager
    def removed(self, folder: str) -> Iterator[None]:
        marker = _marker_of(folder)
        self.objects.put(marker, b"[]", None)
        yield
        self._delete(folder)
        self.objects.delete(marker)

    def replace(self, name: str, data: bytes, seen: Etag | None) -> Etag:
        try:
            return self.objects.put(name, data, seen)
        except Changed:
            raise Changed(self.where(name)) from None

    def set_aside(self, name: str) -> str:
        free = next(free for number in range(1, 100) if (free := f"{name}.damaged-{number}") not in self._visible())
        self.objects.put(free, self._get(name)[1], None)
        self.objects.delete(name)
        return free.rpartition("/")[2]

    def let_read(self, folder: str) -> None:
        """Who may read a bucket is not written on its objects."""

    def _lease(self) -> Etag:
        """Take the lock, or take it over where its holder's time has passed; it ends with neither of them."""
        until = json.dumps({"until": self._now() + LEASE_SECONDS, "by": uuid.uuid4().hex}).encode()
        seen = None
        if LOCK in self.objects.names():
            seen, held = self.objects.get(LOCK)
            if json.loads(held)["until"] > self._now():
                raise Broken(f"{self.where()}: is being changed by another process; try later")
        return self.objects.put(LOCK, until, seen)

    def _markers(self) -> list[tuple[str, str]]:
        """Each marker, and the folder that it is about."""
        pairs = [(name, name.replace(UNFINISHED, "")) for name in self.objects.names()]
        return [pair for pair in pairs if pair[0] != pair[1]]

    def _unfinished(self) -> list[str]:
        """Folders that are being written, or removed."""
        files = {folder: json.loads(self.objects.get(marker)[1]) for marker, folder in self._markers()}
        held = set(self.objects.names())
        return [folder for folder, names in files.items() if not names or {f"{folder}/{name}" for name in names} - held]

    def _visible(self, prefix: str = "") -> list[str]:
        hidden = tuple(f"{folder}/" for folder in self._unfinished())
        names = [name for name in self.objects.names(prefix) if UNFINISHED not in name and name != LOCK]
        return [name for name in names if not name.startswith(hidden)]

    def _get(self, name: str) -> tuple[Etag, bytes]:
        if name not in self._visible(name):
            raise self._absent(name)
        return self.objects.get(name)

    def _absent(self, name: str) -> FileNotFoundError:
        return FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), self.where(name))

    def _delete(self, folder: str) -> None:
        names = self.objects.names(f"{folder}/")
        for name in sorted(names, key=lambda name: name.count("/") > folder.count("/") + 1):
            self.objects.delete(name)


def _marker_of(folder: str) -> str:
    parent, slash, name = folder.rpartition("/")
    return f"{parent}{slash}{UNFINISHED}{name}"
