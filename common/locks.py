"""One writer at a time: a lock that a process holds on a place for as long as it writes there.

The kernel takes the lock back when its process ends, even by kill -9, so that no dead process keeps a place closed.
"""

from __future__ import annotations

import fcntl
import os
import re
import socket
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from dfmcl.common.errors import BadInput, unwritable

LOCK = ".lock"
TRIES = 100
OPEN = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK  # NFS locks only what is open for writing


class Taken(BadInput):
    """Another process writes there."""


@contextmanager
def held(lock: Path, place: Path) -> Iterator[None]:
    """Hold the file `lock` for as long as the block runs.

    The file goes in the end, and so do the directories that were made for it and stayed empty.
    place: what is written meanwhile, for messages. Taken where another process holds the lock; BadInput where the file
    cannot be made, or where the file system has no locks: two writers there would not notice each other.
    """
    made = [folder for folder in lock.parents if not folder.exists()]
    try:
        file = _take(lock, place)
        try:
            yield
        finally:
            with suppress(OSError):  # its storage is away; the lock ends with the process in any case
                lock.unlink(missing_ok=True)  # before the lock goes, so that nobody holds a file that others cannot see
            os.close(file)
    finally:
        for folder in made:
            with suppress(OSError):
                folder.rmdir()


def beside(path: Path) -> Path:
    """Where the lock of a file lies, or of a directory that is replaced as a whole."""
    return path.with_name(f".{path.name}{LOCK}")


def _take(lock: Path, place: Path) -> int:
    """The lock's open file, held; anew where its last holder removed the file before we held it."""
    while True:
        file = _opened(lock, place)
        try:
            if not stat.S_ISREG(os.fstat(file).st_mode):
                raise BadInput(f"{place}: {lock}, its lock, is no regular file; remove it")
            _lock(file, place)
            if _is_at(file, lock):
                os.ftruncate(file, 0)
                os.pwrite(file, f"{os.getpid()} {socket.gethostname()}\n".encode(), 0)
                return file
        except BaseException:
            os.close(file)
            raise
        os.close(file)


def _opened(lock: Path, place: Path) -> int:
    for tries_left in reversed(range(TRIES)):
        try:
            lock.parent.mkdir(parents=True, exist_ok=True)
            return os.open(lock, OPEN, 0o666)
        except OSError as error:
            if tries_left and isinstance(error, FileNotFoundError | FileExistsError):
                continue  # its last holder removed the directory meanwhile: mkdir says either; /proc always the first
            raise unwritable(place, error) from None
    raise AssertionError("the last try returns or raises")


def _lock(file: int, place: Path) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise Taken(f"{place}: {_holder(file)} writes there; wait for its end, or name another place") from None
    except OSError as error:
        raise BadInput(
            f"{place}: cannot be locked ({error.strerror}), so that two writers would not notice each other; name a"
            " place on a file system that has flock, such as a local disk"
        ) from None


def _holder(file: int) -> str:
    said = re.fullmatch(r"(\d+) (\S+)\n", os.pread(file, 300, 0).decode(errors="replace"))
    return f"process {said[1]} on {said[2]}" if said else "another process"


def _is_at(file: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file), path.lstat())
    except FileNotFoundError:
        return False
