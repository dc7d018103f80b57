"""SHA-256 of many image files, and a place that keeps them for as long as a file's size and times stay the same."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from dfmcl.common.errors import BadInput, DfmclError
from dfmcl.common.files import write_bytes
from dfmcl.common.progress import Track, silent
from dfmcl.robustness.folder import file_digest, unreadable
from dfmcl.robustness.members import Source, holder

HEAD = "dfmcl.digests/1"
READERS, TOGETHER = 8, 64  # threads, for storage that answers late; files that one is given at once
Stamp = tuple[int, int, int]  # a file's size, and when its content and its entry changed, in nanoseconds


@dataclass(frozen=True)
class Kept:
    """A folder of digests. verify: read all files all the same, and refuse a digest that is wrong. test: also of test
    images, which a gate reads itself, because its verdict is about them."""

    folder: Path
    verify: bool = False
    test: bool = True

    @staticmethod
    def usual(*, verify: bool = False, test: bool = True) -> Kept:
        """$DFMCL_CACHE, or $XDG_CACHE_HOME/dfmcl, or ~/.cache/dfmcl."""
        base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")  # noqa: PTH111  # never raises
        return Kept(Path(os.environ.get("DFMCL_CACHE") or Path(base) / "dfmcl"), verify, test)

    def file(self, place: str) -> Path:
        """Where the digests of a part of a data set lie."""
        return self.folder / f"{sha256(os.fsencode(place)).hexdigest()}.digests"


def digests_of(
    sources: Sequence[Source], track: Track = silent, label: str = "digests", kept: Kept | None = None, place: str = ""
) -> list[str]:
    """Hex SHA-256 of the bytes of each, in order; BadInput where one cannot be read.

    kept: where digests of earlier runs are, and go; place: what these belong to.
    """
    if kept is None:
        return list(track(_read(sources), label, len(sources)))
    file = kept.file(os.path.abspath(place))  # noqa: PTH100  # of a name, whose links stay
    known, stamps = _load(file), dict[str, Stamp]()
    keys = [(str(source), _stamp(source, stamps)) for source in sources]
    old = [known.get(name, ("", None)) for name, _ in keys]
    held = [digest if stamp == now else "" for (digest, stamp), (_, now) in zip(old, keys, strict=True)]
    missing = [number for number, digest in enumerate(held) if kept.verify or not digest]
    found = list(held)
    read = track(_read([sources[number] for number in missing]), label, len(missing))
    for number, digest in zip(missing, read, strict=True):
        if held[number] and held[number] != digest:
            told = "holds other bytes than its kept digest says, though size and times are the same"
            raise BadInput(f"{sources[number]}: {told}; remove {file}, and measure again what was measured since")
        found[number] = digest
    if missing and found != held:
        after = dict[str, Stamp]()
        # Of a file that changed while it was read nobody knows which bytes its stamp belongs to.
        still = [_stamp(source, after) == stamp for source, (_, stamp) in zip(sources, keys, strict=True)]
        _save(file, {name: (d, stamp) for (name, stamp), d, same in zip(keys, found, still, strict=True) if same})
    return found


def _read(sources: Sequence[Source]) -> Iterator[str]:
    parts = [sources[begin : begin + TOGETHER] for begin in range(0, len(sources), TOGETHER)]
    pool = ThreadPoolExecutor(READERS)
    try:
        for digests in pool.map(lambda part: [file_digest(source) for source in part], parts):
            yield from digests
    finally:
        pool.shutdown(cancel_futures=True)


def _stamp(source: Source, seen: dict[str, Stamp]) -> Stamp:
    """Of the file that holds it; seen: of files that hold many."""
    path = holder(source)
    if path not in seen:
        try:
            found = os.stat(path)  # noqa: PTH116  # as in `members`, a million times
        except OSError as error:
            raise unreadable(source, error) from None
        seen[path] = found.st_size, found.st_mtime_ns, found.st_ctime_ns
    return seen[path]


def _load(file: Path) -> Mapping[str, tuple[str, Stamp]]:
    """What was kept, by name; nothing where the file is not there, or not ours."""
    try:
        head, *words = file.read_bytes().decode("utf-8", "surrogateescape").split("\0")
        if head != HEAD or len(words) % 5:
            return {}
        rows = zip(*(iter(words),) * 5, strict=True)
        return {name: (digest, (int(size), int(wrote), int(changed))) for name, digest, size, wrote, changed in rows}
    except (OSError, ValueError):
        return {}


def _save(file: Path, rows: Mapping[str, tuple[str, Stamp]]) -> None:
    """Keep them where that can be done: a home that cannot be written costs time and nothing else."""
    words = [HEAD, *(str(word) for name, (digest, stamp) in rows.items() for word in (name, digest, *stamp))]
    with suppress(OSError, DfmclError):
        file.parent.mkdir(parents=True, exist_ok=True)
        write_bytes(file, "\0".join(words).encode("utf-8", "surrogateescape"))
