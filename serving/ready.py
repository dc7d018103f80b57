"""The ready file: JSON that tells where a server is, there while it answers.

A server that was killed cannot remove it, so that it names its process: a reader through `read_ready` does not
believe a dead one's.
"""

from __future__ import annotations

import fcntl
import glob
import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from dfmcl.common.errors import BadInput, unwritable
from dfmcl.common.reader import TEXT_BYTES, parse_object, read_plain


def read_ready(path: Path) -> dict[str, Any] | None:
    """What a ready file says; None where there is none, or where the process that wrote it is gone."""
    try:
        said = parse_object(read_plain(path, TEXT_BYTES, named=True))
        alive = _born(said["pid"]) == said["started"]
    except (OSError, ValueError, TypeError, KeyError):
        return None
    return dict(said) if alive else None


def write_ready(path: Path, **said: Any) -> None:
    """Say where a server is, with its pid and `started`, the kernel's clock at the start of that process (proc(5)): a
    pid alone is given to another process some day. OSError where it cannot be written; BadInput as `claim_ready`."""
    staged = path.with_name(f".{path.name}.{os.getpid()}.part")
    said = {**said, "pid": os.getpid(), "started": _born(os.getpid())}
    path.parent.mkdir(parents=True, exist_ok=True)
    with _alone(path.parent):
        _require_free(path)  # again: of two that were started together, one has become ready meanwhile
        staged.write_text(json.dumps(said, indent=2) + "\n", encoding="utf-8")
        staged.replace(path)


def require_regular(path: Path) -> None:
    """BadInput where something stands there that no file may replace, such as /dev/null for the whole machine."""
    if path.exists() and not (path.is_file() or path.is_dir()):  # no file replaces a directory
        raise BadInput(f"--ready-file {path}: is no regular file, and would be replaced by one; name another")


def claim_ready(path: Path) -> None:
    """Remove what a dead server left there; BadInput where one that lives has this ready file."""
    require_regular(path)
    _require_free(path)
    try:
        for stale in [path, *path.parent.glob(f".{glob.escape(path.name)}.*.part")]:
            stale.unlink(missing_ok=True)
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):  # known now, not once the server is up
            pass
    except OSError as error:
        raise unwritable(f"--ready-file {path}", error) from None


def _require_free(path: Path) -> None:
    said = read_ready(path)
    if said is not None and said["pid"] != os.getpid():
        raise BadInput(f"--ready-file {path}: is that of a running server (process {said['pid']}); name another")


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """One writer of ready files at a time, where the file system can lock a directory (NFS cannot)."""
    directory = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):
            fcntl.flock(directory, fcntl.LOCK_EX)
        yield
    finally:
        os.close(directory)


def _born(pid: int) -> int:
    """When a process was started, in clock ticks since boot; OSError where there is none."""
    return int(Path("/proc", str(int(pid)), "stat").read_text().rpartition(")")[2].split()[19])
