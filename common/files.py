"""Files that are either whole or not there: staged beside their place, then renamed.

What is staged is called `.NAME.X.part`. A process that was killed leaves it; the next writer, once it holds the place's
lock, removes it.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from dfmcl.common.errors import BadInput, unwritable
from dfmcl.common.locks import beside, held
from dfmcl.common.reader import RECORD_BYTES, Unfit, parse_object, read_plain, why_unread


def sha256_of(path: Path) -> str:
    """Hex SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_json(path: Path, most: int = RECORD_BYTES) -> dict[str, Any]:
    """A JSON object from a plain file of at most so many bytes; BadInput where it is missing or no such thing."""
    try:
        return parse_object(read_plain(path, most))
    except FileNotFoundError:
        raise BadInput(f"{path}: no such file") from None
    except (OSError, Unfit) as error:
        raise BadInput(f"{path}: {why_unread(error)}") from None


def dump_json(value: Any) -> str:
    """JSON as it lies in our files: indented, ASCII-safe, NaN refused."""
    return json.dumps(value, indent=2, allow_nan=False) + "\n"


def write_text(path: Path, text: str) -> None:
    """Write a text file so that a reader sees the old one or the new one, never a part."""
    write_bytes(path, text.encode("utf-8"))


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file so that a reader sees the old one or the new one, never a part."""
    staged = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with staged.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        staged.replace(path)
    except BaseException as error:  # also a second Ctrl-C
        with suppress(OSError):
            staged.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise unwritable(path, error) from None
        raise


def clear_parts(folder: Path, names: Collection[str] | None = None) -> None:
    """Remove what killed writers left of these files (None: of any) in a folder that nobody else writes to now."""
    for path in folder.glob(".*.part"):
        staged = re.fullmatch(r"\.(.+)\.\d+\.part", path.name)
        if staged and (names is None or staged[1] in names):
            with suppress(OSError):
                path.unlink()


@contextmanager
def whole_directory(out: Path, names: Collection[str]) -> Iterator[Path]:
    """Yield a staging directory that becomes `out` when the block ends well, and vanishes when it does not.

    An existing `out` is replaced only if nothing is in it but files of these names, i.e. what the same command wrote.
    BadInput where another process is about to replace it.
    """
    _require_replaceable(out)
    with held(beside(out), out):
        _clear_staged(out)
        staged = _staging(out, names)
        try:
            staged.chmod(0o755)  # mkdtemp makes 0700; servers that read this run under other users
            yield staged
            try:
                _swap(staged, out)
            except OSError as error:
                raise unwritable(out, error) from None
        finally:
            shutil.rmtree(staged, ignore_errors=True)


def require_place(out: Path, names: Collection[str]) -> None:
    """Raise now, before the work, what `whole_directory` would raise about its place."""
    _require_replaceable(out)
    shutil.rmtree(_staging(out, names), ignore_errors=True)  # the lock's holder may have removed it already


@contextmanager
def only_writer(path: Path, format: str) -> Iterator[None]:  # as the files themselves call it
    """Keep others from writing a JSON file of a format for as long as the block runs; see `require_file_place`."""
    require_file_place(path, format)
    with held(beside(path), path):
        clear_parts(path.parent, {path.name})
        yield


def require_file_place(path: Path, format: str) -> None:  # as the files themselves call it
    """Raise now, before the work, why a JSON file of a format could not be written there.

    A file may only replace one of its format: what else was named, such as a checkpoint or a device, would be lost.
    """
    if path.is_dir() or not path.parent.is_dir():
        raise BadInput(f"{path}: {'is a directory; name a file' if path.is_dir() else 'its directory is not there'}")
    require_regular(path)
    try:
        if path.exists() and not holds(path, format):
            raise BadInput(f"{path}: is there, and this command did not write it; name another file")
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise unwritable(path, error) from None


def require_regular(path: Path) -> None:
    """BadInput where something stands there that no file may replace, such as /dev/null for the whole machine."""
    if path.exists() and not (path.is_file() or path.is_dir()):  # no file replaces a directory
        raise BadInput(f"{path}: is no regular file, and would be replaced by one; name another")


def holds(path: Path, format: str) -> bool:  # as above
    """Whether a file is empty, or JSON of a format, as its first entry says."""
    with path.open("rb") as file:
        begin = file.read(100)
    return not begin or f'"format": "{format}"'.encode() in begin


def _require_replaceable(out: Path) -> None:
    if out.name in ("", "..") or os.path.ismount(out):
        raise BadInput(f"{out}: cannot be replaced as a whole; name a directory in it")


def _clear_staged(out: Path) -> None:
    """Remove what killed processes staged; what was `out` comes back where the kill came between two renames."""
    for path in out.parent.glob(".*"):
        found = re.fullmatch(rf"\.{re.escape(out.name)}\.[a-z0-9_]{{8}}\.(part|old)", path.name)
        if found is None or path.is_symlink():
            continue
        if found[1] == "old" and not os.path.lexists(out):
            path.rename(out)
        shutil.rmtree(path, ignore_errors=True)


def _staging(out: Path, names: Collection[str]) -> Path:
    """An empty directory beside `out`, which may take its place."""
    if (out.exists() or out.is_symlink()) and not out.is_dir():
        raise BadInput(f"{out}: is a file; name a directory")
    try:
        found = sorted(path.name for path in out.iterdir()) if out.exists() else []
        strangers = [name for name in found if name not in names and not _left_of(name, names)]
        if strangers:
            raise BadInput(f"{out}: holds {strangers[0]}, which this command did not write; name another directory")
        out.parent.mkdir(parents=True, exist_ok=True)
        return Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=".part", dir=out.parent))
    except OSError as error:
        raise unwritable(out, error) from None


def _left_of(name: str, names: Collection[str]) -> bool:
    """Whether a file is what a killed process left of one of these: half of it, or its lock."""
    left = re.fullmatch(r"\.(.+)\.(\d+\.part|lock)", name)
    return left is not None and left[1] in names


def _swap(staged: Path, out: Path) -> None:
    old = staged.with_suffix(".old")
    if out.exists():
        out.rename(old)
    try:
        staged.rename(out)
    except OSError:
        if old.exists():
            old.rename(out)
        raise
    shutil.rmtree(old, ignore_errors=True)
