"""An image in a parquet file as Hugging Face's `datasets` writes it: column `image`, a struct of bytes and path."""

from __future__ import annotations

import functools
import os
from dataclasses import dataclass
from typing import Any

from dfmcl.common.errors import BadInput, lacks_memory

COLUMN, GROUPS = "image", 8  # row groups that are kept decoded: one for each thread that reads digests


@dataclass(frozen=True)
class Row:
    """table: the file; group, place: the row group and the row in it; number: the row in the file, from 0."""

    table: str
    group: int
    place: int
    number: int

    def __str__(self) -> str:
        return f"{self.table}: row {self.number}"


def content(row: Row) -> bytes | str:
    """The image's bytes, or the path of the file that holds them; BadInput where there is neither."""
    cell = _group(row.table, _written(row.table), row.group)[row.place].as_py() or {}
    if data := cell.get("bytes"):
        return bytes(data)
    path = cell.get("path") or ""
    folder = os.path.dirname(row.table)  # noqa: PTH120  # of a path that is a string everywhere here
    if "\0" in path:
        raise BadInput(f"{row}: names {path!r}, which is no file; write the table again, with the images' bytes in it")
    inside = os.path.realpath(os.path.join(folder, path))  # noqa: PTH118  # as above
    if not path or not inside.startswith(os.path.realpath(folder) + os.sep):
        told = f"names {path}, which lies elsewhere" if path else "holds no image"
        raise BadInput(f"{row}: {told}; write the table again, with the images' bytes in it")
    return inside


def arrow() -> Any:
    """pyarrow's parquet; BadInput where it is not installed."""
    try:
        from pyarrow import parquet
    except ModuleNotFoundError:
        raise BadInput("data: parquet needs pyarrow; pip install 'dfmcl[parquet]'") from None
    return parquet


def table(path: str) -> Any:
    """An open file; BadInput where it is none."""
    return _table(path, _written(path))


def _written(path: str) -> int:
    """When, in nanoseconds: a file that was written since is opened again."""
    try:
        return os.stat(path).st_mtime_ns  # noqa: PTH116  # for each image
    except OSError as error:
        raise unread(path, error) from None


@functools.lru_cache(maxsize=GROUPS)
def _table(path: str, written: int) -> Any:
    parquet = arrow()
    try:
        return parquet.ParquetFile(path)
    except Exception as error:  # noqa: BLE001  # pyarrow has a class for each of its libraries
        raise unread(path, error) from None


@functools.lru_cache(maxsize=GROUPS)
def _group(path: str, written: int, group: int) -> Any:
    try:
        # Without pyarrow's threads: a worker process that was forked has none.
        return _table(path, written).read_row_group(group, columns=[COLUMN], use_threads=False).column(0)
    except BadInput:
        raise
    except Exception as error:  # noqa: BLE001  # as above
        raise unread(path, error) from None


def unread(path: str, error: Exception) -> Exception:
    """What is said of a file that pyarrow cannot read; an error of memory stays one."""
    if lacks_memory(error):
        return error
    said = getattr(error, "strerror", None) or (str(error).splitlines() or [type(error).__name__])[0]
    return BadInput(f"{path}: not readable as .parquet: {said}")
