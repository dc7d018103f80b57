"""What can be seen of a repository at this moment: what is absent, unreadable or half there is told from what is new.

Storage goes away and comes back: a mount that is gone for a second is an empty directory, a stale handle, half a copy.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from dfmcl.common.errors import BadInput, DfmclError
from dfmcl.common.reader import TEXT_BYTES, Unfit
from dfmcl.release import layout
from dfmcl.release.stores.store import Etag, Store, told


@dataclass(frozen=True)
class Mark:
    """A model as it lies there. version: that its config.pbtxt serves; etags: of its files."""

    config: bytes
    version: int
    etags: tuple[Etag, ...]


@dataclass(frozen=True)
class Sight:
    """marks: of the models that are whole; troubles: why another cannot be read, or "", the repository; by name."""

    marks: Mapping[str, Mark] = field(default_factory=dict)
    troubles: Mapping[str, DfmclError] = field(default_factory=dict)


def look(store: Store) -> Sight:
    """Every model of a repository that can be read as a whole."""
    marks: dict[str, Mark] = {}
    troubles: dict[str, DfmclError] = {}
    try:
        store = store.now()
        names = [entry.name for entry in store.entries() if entry.folder and not entry.name.startswith(".")]
    except OSError as error:
        return Sight({}, {"": told(error, f"{store.where()}: cannot be read: {error.strerror}")})
    for name in names:
        try:
            mark = _mark(store, name)
        except BadInput as error:
            troubles[name] = error
        except OSError as error:
            troubles[name] = told(error, f"{error.filename}: cannot be read: {error.strerror}")
        else:
            if mark is not None:
                marks[name] = mark
    return Sight(marks, troubles)


def _mark(store: Store, name: str) -> Mark | None:
    """None where there is no config, as in what is no model."""
    path = f"{name}/{layout.CONFIG}"
    try:
        config = store.read(path, TEXT_BYTES)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except Unfit as error:
        raise BadInput(f"{store.where(path)}: {error}") from None
    if (version := layout.served_version(store, name)) is None:
        return None
    folder = f"{name}/{version}"
    signed = [layout.SIGNATURE] if layout.lies_there(store, f"{folder}/{layout.SIGNATURE}") else []
    files = (*sorted(layout.VERSION_FILES), *signed)
    return Mark(config, version, tuple(store.etag(f"{folder}/{file}") for file in files))
