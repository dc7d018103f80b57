"""Where releases lie: files under names such as digits/1/model.onnx, for many readers and one writer at a time.

What each member must do is written here, and tests/release/test_stores.py asks it of each.
"""

from __future__ import annotations

import errno
from collections.abc import Hashable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Protocol

from dfmcl.common.errors import MACHINE, BadInput, Broken, DfmclError

Etag = Hashable  # of a file: another one where other bytes lie there


class Store(Protocol):
    """Files by name. A name has slashes; "" is the store itself. What a writer has not finished has no name.

    All raise OSError where the store cannot be read or written, FileNotFoundError where nothing has that name.
    whole: whether all that one `writing` changed has its names at once, at its end, and nothing where the block fails.
    poll_seconds: how long to wait between two looks at what nobody has changed.
    """

    whole: ClassVar[bool]
    poll_seconds: ClassVar[float]

    def now(self) -> Store:
        """The store to be read as it is at this moment, for many questions that one change must not fall between.

        Where a question is a request, this is the only one until bytes are asked for. A directory has no such moment.
        """

    def where(self, name: str = "") -> str:
        """The address of a file or folder, as messages have it."""

    def entries(self, folder: str = "") -> list[Item]:
        """What lies in a folder, by name."""

    def read(self, name: str, most: int) -> bytes:
        """A file's bytes; Unfit where it is no plain file, or holds more than `most`."""

    def etag(self, name: str) -> Etag:
        """Of a file as it lies there now."""

    def local(self, folder: str) -> Path:
        """The folder on this machine, for programs that read files: itself, or a copy. Nobody writes there.

        A folder that is not there has a path that does not exist. To ask again is cheap where nothing has changed.
        """

    def writing(self) -> AbstractContextManager[None]:
        """Be the only writer for as long as the block runs; what dead writers left unfinished is removed first.

        Makes the store where there is none. Broken where another writer does not end; Changed, at the block's end,
        where a store that is `whole` was changed by another one meanwhile: nothing of the block is kept then.
        """

    def added(self, folder: str) -> AbstractContextManager[Path]:
        """An empty folder of this machine; its files have their names once the block ends well, all of them or none.

        FileExistsError where something has the folder's name.
        """

    def removed(self, folder: str) -> AbstractContextManager[None]:
        """Take a folder away, all of it at once, before the block runs; its bytes may go after it."""

    def replace(self, name: str, data: bytes, seen: Etag | None) -> Etag:
        """Write a whole file where it is as it was seen (None: where nothing has that name); its new etag.

        Changed where it is not. A folder that is missing is made.
        """

    def set_aside(self, name: str) -> str:
        """Give what has a name, whatever it is, another one beside it: that one."""

    def let_read(self, folder: str) -> None:
        """Let all readers of the store read what lies in a folder."""


@dataclass(frozen=True)
class Item:
    """What lies in a folder. folder, file: what it is, or a link leads to; leaves: whether a link leads elsewhere."""

    name: str
    folder: bool = False
    file: bool = False
    link: bool = False
    leaves: bool = False


class Changed(OSError):
    """A file is not as it was seen."""

    def __init__(self, where: str) -> None:
        super().__init__(errno.EBUSY, "another writer replaced it", where)


class UnusableStore(OSError):
    """The store itself cannot be asked, or does not hold what it names; that is told from a store that is empty.

    silent: whether nobody answers, or a server that fails inside, which no other argument mends.
    """

    def __init__(self, where: str, reason: str, *, silent: bool = False) -> None:
        super().__init__(errno.EIO, reason, where)
        self.exit_code = (Broken if silent else BadInput).exit_code

    def __str__(self) -> str:
        return f"{self.filename}: {self.strerror}"


def told(error: OSError, message: str) -> DfmclError:
    """Why a store could not be read, for the user: Broken where no other argument mends it, else BadInput."""
    broken = error.exit_code == Broken.exit_code if isinstance(error, UnusableStore) else error.errno in MACHINE
    return Broken(message) if broken else BadInput(message)


@contextmanager
def local_folder(store: Store, folder: str) -> Iterator[Path]:
    """A folder on this machine, which errors name as it is called in the store, also where it is a copy."""
    local = store.local(folder)
    try:
        yield local
    except DfmclError as error:
        error.args = (str(error).replace(str(local), store.where(folder)), *error.args[1:])
        raise
