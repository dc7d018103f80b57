"""Files from others: plain ones only, no larger than they may be, and JSON that says one thing alone."""

from __future__ import annotations

import json
import os
import re
import stat
from collections.abc import Iterable
from io import BufferedReader
from pathlib import Path
from typing import Any

MEBIBYTE = 2**20
TEXT_BYTES = MEBIBYTE  # a configuration, a key, a list of labels
MANIFEST_BYTES = 16 * MEBIBYTE  # 100,000 classes with names of 100 letters take 10
RECORD_BYTES = 128 * MEBIBYTE  # a gate's report on 50,000 images under six attacks takes 40
DEPTH = 32  # a report is nested eight deep
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


class Unfit(ValueError):
    """A file that is read no further; the message says why, without its name."""


def read_plain(path: Path, most: int, *, named: bool = False) -> bytes:
    """A file's bytes; raises as `opened` does."""
    with opened(path, most, named=named) as file:
        data = file.read(most + 1)
    if len(data) > most:  # it grew, or lies in /proc, where sizes are 0
        raise _large(len(data), most)
    return data


def opened(path: Path, most: int | None = None, *, named: bool = False) -> BufferedReader:
    """A file, open to be read; OSError where it cannot be, Unfit where it is no plain file or holds more than `most`.

    Neither a FIFO without a writer nor a device without an end keeps anybody waiting. named: by the user, who may
    name a link to anywhere; a link that lies among a user's files must stay in its directory.
    """
    if "\0" in str(path):
        raise Unfit("is no file name: it holds a null character")
    if not named and leaves(path):
        raise Unfit("is no plain file, but a link that leaves its directory")
    _require_plain(path.stat(), most)
    # The second look is at what was opened: the name may have become another file's in between.
    file = os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC), "rb")
    try:
        _require_plain(os.fstat(file.fileno()), most)
    except Unfit:
        file.close()
        raise
    return file


def leaves(path: Path) -> bool:
    """Whether a path is a symbolic link to somewhere outside the directory that it lies in."""
    return path.is_symlink() and path.parent.resolve() not in path.resolve().parents


def parse_json(data: bytes) -> Any:
    """The value of a JSON text in UTF-8; Unfit where it is none, or can be read in more than one way.

    Refused: a key twice in one object, NaN and infinity, numbers beyond float64, lone surrogates, nesting below DEPTH.
    """
    try:
        text = data.decode("utf-8")
        value = json.loads(text, object_pairs_hook=_object, parse_constant=_no_number, parse_float=_finite)
        if _SURROGATE.search(text):
            json.dumps(value, ensure_ascii=False).encode()  # raises where a half stands alone
    except RecursionError:
        raise Unfit(f"is nested deeper than {DEPTH}") from None
    except Unfit:
        raise
    except ValueError as error:
        raise Unfit(f"not readable as JSON: {error}") from None
    if _deeper(value, DEPTH):
        raise Unfit(f"is nested deeper than {DEPTH}")
    return value


def parse_object(data: bytes) -> dict[str, Any]:
    """The same where it is an object."""
    value = parse_json(data)
    if not isinstance(value, dict):
        raise Unfit(f"expected a JSON object, found {type(value).__name__}")
    return value


def why_unread(error: OSError | ValueError) -> str:
    """What a message says of a file that could not be read."""
    return (error.strerror if isinstance(error, OSError) else "") or str(error)


def _require_plain(found: os.stat_result, most: int | None) -> None:
    if not stat.S_ISREG(found.st_mode):
        raise Unfit("Is a directory" if stat.S_ISDIR(found.st_mode) else "is no plain file")
    if most is not None and found.st_size > most:
        raise _large(found.st_size, most)


def _large(size: int, most: int) -> Unfit:
    return Unfit(f"holds {size:,} bytes or more, and at most {most:,} are read")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]  # None
        raise Unfit(f"not readable as JSON: {twice[:80]!r} stands twice in one object")
    return value


def _no_number(name: str) -> float:
    raise Unfit(f"not readable as JSON: {name} is no number in JSON")


def _finite(text: str) -> float:
    value = float(text)
    if value in (float("inf"), float("-inf")):
        raise Unfit(f"not readable as JSON: {text[:20]} is beyond float64")
    return value


def _deeper(value: Any, levels: int) -> bool:
    """Whether more than so many lists and objects lie in one another; level by level, without recursion."""
    layer: list[Any] = [value] if isinstance(value, list | dict) else []
    while layer and levels:
        layer = [inner for outer in layer for inner in _inside(outer) if isinstance(inner, list | dict)]
        levels -= 1
    return bool(layer)


def _inside(outer: Any) -> Iterable[Any]:
    return outer.values() if isinstance(outer, dict) else outer
