"""Where an image's bytes lie: a file of its own, a stretch of a tar shard, or a row of a table."""

from __future__ import annotations

import os
from dataclasses import dataclass
from io import BufferedReader, BytesIO
from stat import S_ISREG

from dfmcl.common.errors import BadInput
from dfmcl.robustness.rows import Row, content


@dataclass(frozen=True)
class Member:
    """A file inside a tar file that is not compressed. offset, size: of its bytes."""

    shard: str
    name: str
    offset: int
    size: int

    def __str__(self) -> str:
        return f"{self.shard}/{self.name}"


Source = str | Member | Row


def holder(source: Source) -> str:
    """The path of the file that holds these bytes, or names the file that does."""
    if isinstance(source, Row):
        return source.table
    return source if isinstance(source, str) else source.shard


def opened(source: Source) -> BufferedReader | BytesIO:
    """The bytes of a path or a member; OSError as `open`, BadInput where it is no regular file or is cut off."""
    if isinstance(source, Row):
        found = content(source)
        return _regular(found) if isinstance(found, str) else BytesIO(found)
    if isinstance(source, str):
        return _regular(source)
    with _regular(source.shard) as shard:
        shard.seek(source.offset)
        data = shard.read(source.size)
    if len(data) < source.size:
        raise BadInput(f"{source}: is cut off; make the shard again")
    return BytesIO(data)


def _regular(path: str) -> BufferedReader:
    """The file, open; a FIFO or a device would keep its reader waiting."""
    if not S_ISREG(os.stat(path).st_mode):  # noqa: PTH116  # 2 us, where a Path takes 10, a million times
        raise BadInput(f"{path}: is no regular file; remove it")
    return open(path, "rb")  # noqa: PTH123  # as above; the caller closes it
