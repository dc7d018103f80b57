"""A bucket as a store: bytes lie in objects that nobody writes twice, and one small object says which of them count.

PREFIX/repository.json        every file's name, digest and place: replaced on the condition that it is as it was seen
PREFIX/content/<change>/...   what a change brought along, and nobody reads before the first names it

So a change is there at once, or not at all, whatever its writer died of; a look is one request; and of two changes at
once, the one that ends later is told.
"""

from __future__ import annotations

import copy
import errno
import hashlib
import os
import shutil
import tempfile
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import lru_cache
from itertools import count
from pathlib import Path
from typing import ClassVar, Protocol

from dfmcl.common.errors import Broken
from dfmcl.common.files import sha256_of
from dfmcl.common.reader import MEBIBYTE, RECORD_BYTES, Unfit
from dfmcl.release.stores.index import Held, Index
from dfmcl.release.stores.store import Changed, Etag, Item, UnusableStore

INDEX = "repository.json"
CONTENT = "content/"
TEXT_BYTES = MEBIBYTE // 4  # of a file that comes with a new model: one that may be replaced is smaller
COPIES = 4  # folders that are kept on this machine; a model's versions, judged one after the other, would fill its disk
# What nobody names and is older, a dead writer left. A writer that takes half as long gives up, so that none is robbed.
ABANDONED_SECONDS = 24 * 3600.0


class Objects(Protocol):
    """The objects of a bucket below one prefix. All raise UnusableStore where it cannot be asked."""

    address: str

    def get(self, key: str, most: int, known: Etag | None = None) -> tuple[Etag, bytes] | None:
        """An object and its etag, None where it still is as known; FileNotFoundError where there is none; Unfit where
        it holds more than `most` bytes."""

    def fetch(self, key: str, path: Path) -> None:
        """Write an object to a new file; FileNotFoundError where there is none."""

    def put(self, key: str, body: bytes, seen: Etag | None) -> Etag:
        """Write an object where it is as it was seen (None: where there is none), else Changed; its new etag."""

    def create(self, key: str, body: bytes | Path) -> None:
        """Write an object under a key that nobody else has."""

    def delete(self, keys: Iterable[str]) -> None:
        """Remove objects, whether they are there or not."""

    def listing(self, prefix: str) -> Iterator[tuple[str, float]]:
        """Keys that begin so, and when each object was written, in unix seconds."""


class BucketStore:
    """A `Store` in a bucket. now: unix seconds."""

    whole: ClassVar[bool] = True
    poll_seconds: ClassVar[float] = 2.0  # of requests that are paid for: 1.3 million in a month

    def __init__(self, objects: Objects, now: Callable[[], float] = time.time) -> None:
        self._objects, self._clock = objects, now
        self._temporary = tempfile.TemporaryDirectory(prefix="dfmcl-bucket-")
        self._copies: dict[Path, None] = {}  # the last one asked for comes last
        self._recent = lru_cache(COPIES * 8)(self._bytes)  # objects never change
        self._last = Index()
        self._fixed: Index | None = None  # in a view, and while this is the writer
        self._change, self._brought = "", list[str]()  # the writer's, and the keys that it wrote

    def where(self, name: str = "") -> str:
        return f"{self._objects.address}/{name}".rstrip("/")

    def now(self) -> BucketStore:
        view = copy.copy(self)
        view._fixed, view._change = self._index(), ""
        return view

    def entries(self, folder: str = "") -> list[Item]:
        found = self._index().folders.get(folder)
        if found is None and (folder or not (self._change or self._index().etag)):
            raise self._absent(folder)
        return [Item(name, folder=inner, file=not inner) for name, inner in sorted((found or {}).items())]

    def read(self, name: str, most: int) -> bytes:
        held = self._held(name)
        if held.size > most:
            raise Unfit(f"holds {held.size:,} bytes or more, and at most {most:,} are read")
        if held.text is not None:
            return held.text.encode()
        return (self._recent if held.size <= TEXT_BYTES else self._bytes)(name, held)

    def etag(self, name: str) -> Etag:
        return self._held(name).sha256

    def local(self, folder: str) -> Path:
        files = {name.removeprefix(f"{folder}/"): held for name, held in self._index().below(folder).items()}
        held = repr((folder, sorted((name, file.sha256) for name, file in files.items())))
        top = Path(self._temporary.name) / hashlib.sha256(held.encode()).hexdigest()
        place = top / (folder.rpartition("/")[2] or "repository")
        if files:
            if top not in self._copies:
                staged = Path(tempfile.mkdtemp(dir=self._temporary.name))
                try:
                    for name, file in files.items():
                        self._copy(self.where(f"{folder}/{name}".lstrip("/")), file, staged / place.name / name)
                    staged.rename(top)
                finally:
                    shutil.rmtree(staged, ignore_errors=True)
            self._keep(top)
        return place

    @contextmanager
    def writing(self) -> Iterator[None]:
        """No lock: what two did at once, the condition of the one object tells."""
        if self._fixed is not None:
            raise Broken(f"{self.where()}: is being changed by this process")
        begun = self._clock()
        self._sweep(begun)
        before = self._fixed = self._index()
        self._change, self._brought = uuid.uuid4().hex[:12], []
        try:
            yield
            if self._fixed.files != before.files:
                self._commit(before, self._fixed, begun)
        except UnusableStore:  # nobody knows what was written
            raise
        except Exception:  # whatever ended it, nothing names these objects
            with suppress(UnusableStore):
                self._objects.delete(self._brought)
            raise
        finally:
            self._fixed, self._change = None, ""

    @contextmanager
    def added(self, folder: str) -> Iterator[Path]:
        with tempfile.TemporaryDirectory() as temporary:
            yield Path(temporary)
            if folder in self._index().folders or folder in self._index().files:
                raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), self.where(folder))
            paths = sorted(path for path in Path(temporary).rglob("*") if path.is_file())
            self._take({f"{folder}/{path.relative_to(temporary)}": path for path in paths}, new="/" in folder)

    @contextmanager
    def removed(self, folder: str) -> Iterator[None]:
        if not (names := self._index().below(folder)):
            raise self._absent(folder)
        self._set(self._index().without(names))
        yield

    def replace(self, name: str, data: bytes, seen: Etag | None) -> Etag:
        there = self._index().files.get(name)
        if (there and there.sha256) != seen or name in self._index().folders:
            raise Changed(self.where(name))
        self._take({name: data})
        return self.etag(name)

    def set_aside(self, name: str) -> str:
        index = self._index()
        held = index.below(name) | ({name: index.files[name]} if name in index.files else {})
        if not held:
            raise self._absent(name)
        places = (f"{name}.damaged-{number}" for number in count(1))
        free = next(place for place in places if place not in index.files and place not in index.folders)
        self._set(index.without(held).with_files({free + file.removeprefix(name): held[file] for file in held}))
        return free.rpartition("/")[2]

    def let_read(self, folder: str) -> None:
        """Who may read a bucket is not written on its objects."""

    def _index(self) -> Index:
        """As it is now, for a request; in a view or a change as that began, with what the change did."""
        if self._fixed is not None:
            return self._fixed
        try:
            found = self._objects.get(INDEX, RECORD_BYTES, self._last.etag)
            if found is not None:
                self._last = Index.from_bytes(found[1], found[0])
        except FileNotFoundError:
            self._last = Index()
        except Unfit as error:
            raise UnusableStore(self.where(INDEX), f"{error}; no `dfmcl` wrote this") from None
        return self._last

    def _held(self, name: str) -> Held:
        if (held := self._index().files.get(name)) is None:
            raise self._absent(name)
        return held

    def _absent(self, name: str) -> FileNotFoundError:
        return FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), self.where(name))

    def _set(self, index: Index) -> None:
        assert self._change, "only in `writing`"
        self._fixed = index

    def _take(self, files: Mapping[str, bytes | Path], *, new: bool = False) -> None:
        """Write files into the bucket, and name them in the change that is under way.

        new: nobody will replace them. Text that is replaced stands in the index, so that no reader finds it gone.
        """
        self._set(self._index().with_files({name: self._written(name, body, new) for name, body in files.items()}))

    def _written(self, name: str, body: bytes | Path, new: bool) -> Held:
        size = len(body) if isinstance(body, bytes) else body.stat().st_size
        if isinstance(body, bytes) or (not new and size <= TEXT_BYTES):
            data = body if isinstance(body, bytes) else body.read_bytes()
            with suppress(UnicodeDecodeError):
                return Held(hashlib.sha256(data).hexdigest(), size, text=data.decode())
        digest = hashlib.sha256(body).hexdigest() if isinstance(body, bytes) else sha256_of(body)
        key = f"{CONTENT}{self._change}/{len(self._brought)}/{name}"
        self._brought.append(key)
        self._objects.create(key, body)
        return Held(digest, size, key)

    def _commit(self, before: Index, after: Index, begun: float) -> None:
        """Put the new index in the old one's place, where that is as it was; then what only that one named goes."""
        if self._clock() - begun > ABANDONED_SECONDS / 2:
            raise OSError(errno.ETIMEDOUT, "took too long; try again", self.where(INDEX))
        if before.etag is None:
            self._require_conditions()
        data = after.to_bytes(self._change)
        try:
            self._objects.put(INDEX, data, before.etag)
        except Changed:
            if self._content(INDEX) != data:  # else tried again after an answer that was lost
                raise Changed(self.where(INDEX)) from None
        except UnusableStore as error:
            if not self._was_written(data, error):
                raise
        kept = {held.key for held in after.files.values()}
        gone = [held.key for held in before.files.values() if held.key is not None and held.key not in kept]
        with suppress(UnusableStore):  # the next sweep removes them
            self._objects.delete(gone)

    def _was_written(self, data: bytes, error: UnusableStore) -> bool:
        """Whether a write was done whose answer is an error; UnusableStore where nobody can say."""
        try:
            return self._content(INDEX) == data
        except OSError:
            reason = f"{error.strerror}; whether the change was written is not known, `dfmcl status` tells"
            raise UnusableStore(self.where(INDEX), reason, silent=True) from None

    def _content(self, key: str) -> bytes:
        try:
            found = self._objects.get(key, RECORD_BYTES)
        except FileNotFoundError:
            return b""
        return found[1] if found else b""

    def _require_conditions(self) -> None:
        """Refuse a bucket whose server writes whatever the condition is: of two changes at once, one would be lost."""
        probe = f"{CONTENT}{self._change}/probe"
        before = self._objects.put(probe, b"", None)
        self._brought.append(probe)
        self._objects.put(probe, b"1", before)
        for seen in (None, before):
            try:
                self._objects.put(probe, b"2", seen)
            except Changed:
                continue
            raise UnusableStore(self.where(), "its server heeds no If-Match and If-None-Match; take one that does")
        self._objects.delete([probe])

    def _sweep(self, now: float) -> None:
        """Remove what nobody names and a dead writer left."""
        old = [key for key, written in self._objects.listing(CONTENT) if now - written > ABANDONED_SECONDS]
        if old:  # first listed, then compared: what was written meanwhile is young
            named = {held.key for held in self._index().files.values()}
            self._objects.delete(key for key in old if key not in named)

    def _bytes(self, name: str, held: Held) -> bytes:
        """Of a file that is an object."""
        try:
            found = self._objects.get(str(held.key), held.size)
        except (FileNotFoundError, Unfit):
            found = None
        if found is None or hashlib.sha256(found[1]).hexdigest() != held.sha256:
            raise self._damaged(self.where(name), held)
        return found[1]

    def _copy(self, where: str, held: Held, path: Path) -> None:
        """Write a file on this machine."""
        path.parent.mkdir(parents=True, exist_ok=True)
        if held.key is None:
            path.write_bytes((held.text or "").encode())
            return
        with suppress(FileNotFoundError):
            self._objects.fetch(held.key, path)
        if not path.exists() or sha256_of(path) != held.sha256:
            raise self._damaged(where, held)

    def _damaged(self, where: str, held: Held) -> UnusableStore:
        return UnusableStore(where, f"its object {held.key} is gone or holds other bytes than were promoted")

    def _keep(self, top: Path) -> None:
        """Note that a copy was asked for; the copies that nobody asked for longest are removed."""
        self._copies.pop(top, None)
        self._copies[top] = None
        while len(self._copies) > COPIES:
            old = next(iter(self._copies))
            del self._copies[old]
            shutil.rmtree(old)
