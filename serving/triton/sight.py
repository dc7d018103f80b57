"""What can be seen of a repository at this moment: what is absent, unreadable or half there is told from what is new.

Storage goes away and comes back: a mount that is gone for a second is an empty directory, a stale handle, half a copy.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from dfmcl.common.errors import BadInput
from dfmcl.common.reader import TEXT_BYTES, Unfit, read_plain
from dfmcl.release import layout


@dataclass(frozen=True)
class Mark:
    """A model as it lies there. version: that its config.pbtxt serves; stats: (inode, time, size) of its files."""

    config: bytes
    version: int
    stats: tuple[tuple[int, int, int], ...]


@dataclass(frozen=True)
class Sight:
    """marks: of the models that are whole, by name; troubles: what cannot be read and why, by path."""

    marks: Mapping[str, Mark] = field(default_factory=dict)
    troubles: Mapping[Path, str] = field(default_factory=dict)


def look(repository: Path) -> Sight:
    """Every model of a repository that can be read as a whole."""
    marks: dict[str, Mark] = {}
    troubles: dict[Path, str] = {}
    try:
        with os.scandir(repository) as entries:
            names = sorted(entry.name for entry in entries if entry.is_dir() and not entry.name.startswith("."))
    except OSError as error:
        return Sight({}, {repository: f"{repository}: cannot be read: {error.strerror}"})
    for name in names:
        try:
            mark = _mark(repository / name)
        except BadInput as error:
            troubles[repository / name] = str(error)
        except OSError as error:
            troubles[repository / name] = f"{error.filename}: cannot be read: {error.strerror}"
        else:
            if mark is not None:
                marks[name] = mark
    return Sight(marks, troubles)


def _mark(model: Path) -> Mark | None:
    """None where there is no config, as in what is no model."""
    try:
        config = read_plain(model / layout.CONFIG, TEXT_BYTES)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except Unfit as error:
        raise BadInput(f"{model / layout.CONFIG}: {error}") from None
    if (version := layout.served_version(model)) is None:
        return None
    stats = [(model / str(version) / name).stat() for name in sorted(layout.VERSION_FILES)]
    return Mark(config, version, tuple((stat.st_ino, stat.st_mtime_ns, stat.st_size) for stat in stats))
