"""A directory as a store: what is written is staged beside its place, on disk, and renamed."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import IO, ClassVar

from dfmcl.common.errors import Broken
from dfmcl.common.reader import leaves, read_plain
from dfmcl.release.stores.store import Changed, Etag, Item, UnusableStore

STAGING = ".staging-"
LOCK = ".promotion.lock"
# As other locks: not through a link, whose file would be emptied, and waiting at no pipe.
OPEN = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
LOCK_SECONDS = 30.0  # a promotion holds it for a second or two


@dataclass(frozen=True)
class Directory:
    """A `Store` below a directory of this machine, or of a file system that it has mounted."""

    root: Path
    whole: ClassVar[bool] = False
    poll_seconds: ClassVar[float] = 0.5

    def now(self) -> Directory:
        return self

    def where(self, name: str = "") -> str:
        return str(self.root / name)

    def entries(self, folder: str = "") -> list[Item]:
        found = [entry_of(path) for path in (self.root / folder).iterdir() if not path.name.startswith(STAGING)]
        return sorted(found, key=lambda entry: entry.name)

    def read(self, name: str, most: int) -> bytes:
        return read_plain(self.root / name, most)

    def etag(self, name: str) -> Etag:
        stat = (self.root / name).stat()
        return stat.st_ino, stat.st_mtime_ns, stat.st_size

    def local(self, folder: str) -> Path:
        return self.root / folder

    @contextmanager
    def writing(self) -> Iterator[None]:
        """A lock of the kernel, which ends with its process, also by kill -9."""
        try:
            self.root.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError):
            raise UnusableStore(str(self.root), "is no directory, and none can be made there; name another") from None
        with _locked(self.root):
            _clear_staging(self.root)
            yield

    @contextmanager
    def added(self, folder: str) -> Iterator[Path]:
        place = self.root / folder
        # Beside its place: within a model's directory for a version, as Triton without explicit model control takes
        # every directory of the repository for a model.
        staged = Path(tempfile.mkdtemp(prefix=STAGING, dir=place.parent))
        try:
            whole = staged / place.name
            whole.mkdir()
            yield whole
            _let_all_read(whole)
            for path in (*whole.rglob("*"), whole):
                _sync(path)
            if os.path.lexists(place):
                raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(place))
            whole.rename(place)
            _sync(place.parent)
        finally:
            shutil.rmtree(staged, ignore_errors=True)

    @contextmanager
    def removed(self, folder: str) -> Iterator[None]:
        place = self.root / folder
        staged = Path(tempfile.mkdtemp(prefix=STAGING, dir=place.parent))
        place.rename(staged / place.name)
        _sync(place.parent)
        yield
        shutil.rmtree(staged)  # the next writer removes what a crash leaves

    def replace(self, name: str, data: bytes, seen: Etag | None) -> Etag:
        path = self.root / name
        if self._seen(name) != seen:
            raise Changed(str(path))
        if path.parent != self.root:
            path.parent.mkdir(exist_ok=True)
            path.parent.chmod(0o755)
        staged = path.with_name(f"{STAGING}{path.name}")
        with staged.open("wb") as file:
            os.fchmod(file.fileno(), 0o644)  # Triton may run as another user than the one who promotes
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        staged.replace(path)
        _sync(path.parent)
        return self.etag(name)

    def set_aside(self, name: str) -> str:
        path = self.root / name
        free = (place for number in count(1) if not (place := path.with_name(f"{path.name}.damaged-{number}")).exists())
        return path.rename(next(free)).name

    def let_read(self, folder: str) -> None:
        _let_all_read(self.root / folder)

    def _seen(self, name: str) -> Etag | None:
        try:
            return self.etag(name)
        except OSError:  # where it is more than absent, the write says so
            return None


def entry_of(path: Path) -> Item:
    """What a path is; an entry that is neither file nor folder where nothing is there."""
    link = path.is_symlink()
    return Item(path.name, path.is_dir(), path.is_file(), link, link and leaves(path))


def _let_all_read(directory: Path) -> None:
    """Triton may run as another user than the one who promotes, whatever that one's umask is."""
    for path in [directory, *directory.rglob("*")]:
        if not path.is_symlink():  # the file behind one is not ours
            path.chmod(0o755 if path.is_dir() else 0o644)


def _sync(path: Path) -> None:
    """Make a file, or the renames in a directory, survive a power cut."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _clear_staging(root: Path) -> None:
    for stale in [path for depth in ("", "*/", "*/*/") for path in root.glob(f"{depth}{STAGING}*")]:
        if stale.is_dir() and not stale.is_symlink():
            shutil.rmtree(stale)
        else:
            stale.unlink(missing_ok=True)


@contextmanager
def _locked(root: Path) -> Iterator[None]:
    """Hold the file that says who may write; anew where a user removed it meanwhile, as two would hold two files."""
    path, deadline = root / LOCK, time.monotonic() + LOCK_SECONDS
    while True:
        with os.fdopen(os.open(path, OPEN, 0o666), "w") as lock:
            _take(lock, root, deadline)
            if _is_file_at(lock, path):
                yield
                return


def _is_file_at(file: IO[str], path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def _take(lock: IO[str], root: Path, deadline: float) -> None:
    """Wait for the process that changes the repository, but not for ever."""
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise Broken(f"{root}: is being changed for {LOCK_SECONDS:g} s by another process; try later") from None
            time.sleep(0.05)  # flock has no deadline of its own
