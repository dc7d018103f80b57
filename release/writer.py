"""One writer at a time in a repository, and staging that a killed one left is removed."""

from __future__ import annotations

import fcntl
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from dfmcl.common.errors import BadInput, Broken
from dfmcl.release import layout, ledger
from dfmcl.release.candidate import read_manifest


def make_readable(directory: Path) -> None:
    """Make a directory that Triton, as another user, can enter."""
    directory.mkdir(exist_ok=True)
    directory.chmod(0o755)


LOCK = ".promotion.lock"
# As other locks: not through a link, whose file would be emptied, and waiting at no pipe.
OPEN = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
LOCK_SECONDS = 30.0  # a promotion holds it for a second or two


@contextmanager
def only_writer(repository: Path, *, settle: bool = True) -> Iterator[list[str]]:
    """Hold the repository's lock, and make good what writers that died left behind.

    Yields a list that a change adds to with each step that cannot be taken back, so that the error of a later one tells
    the truth. settle: whether what dead writers did not write down is written down first, which a damaged history
    forbids.
    """
    done: list[str] = []
    try:
        repository.mkdir(parents=True, exist_ok=True)
        with _locked(repository):
            _clear_staging(repository)
            if settle:
                for name in layout.model_names(repository):
                    with suppress(BadInput):  # a damaged model is no reason to hold up the others
                        let_gpu_follow(repository / name)
                ledger.settle(repository)
            yield done
    except OSError as error:
        state = f"before that, {', '.join(done)}; repeat the command" if done else "nothing was changed"
        raise Broken(f"{error.filename or repository}: {error.strerror or error}; {state}") from None


def _clear_staging(repository: Path) -> None:
    for stale in [path for depth in ("", "*/", "*/*/") for path in repository.glob(f"{depth}{layout.STAGING}*")]:
        if stale.is_dir() and not stale.is_symlink():
            shutil.rmtree(stale)
        else:
            stale.unlink(missing_ok=True)


@contextmanager
def _locked(repository: Path) -> Iterator[None]:
    """Hold the file that says who may write; anew where a user removed it meanwhile, as two would hold two files."""
    path, deadline = repository / LOCK, time.monotonic() + LOCK_SECONDS
    while True:
        with os.fdopen(os.open(path, OPEN, 0o666), "w") as lock:
            _take(lock, repository, deadline)
            if _is_file_at(lock, path):
                yield
                return


def _is_file_at(file: IO[str], path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def _take(lock: IO[str], repository: Path, deadline: float) -> None:
    """Wait for the process that changes the repository, but not for ever."""
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise Broken(
                    f"{repository}: is being changed for {LOCK_SECONDS:g} s by another process; try later"
                ) from None
            time.sleep(0.05)  # flock has no deadline of its own


def let_gpu_follow(model: Path) -> None:
    """Where a writer died between the two configs, the one that is the commit decides."""
    version, path = layout.served_version(model), model / layout.GPU_CONFIG
    text = layout.configs(read_manifest(model / str(version)), model.name, int(version or 0))[layout.GPU_CONFIG]
    if not path.is_file() or path.read_bytes() != text.encode():
        make_readable(path.parent)
        ledger.replace(path, text)
