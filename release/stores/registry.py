"""The kinds of store by the scheme of their addresses; a member is one file beside this one, and one line here."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from dfmcl.common.errors import BadInput
from dfmcl.common.text import scheme_of
from dfmcl.release.stores.cloud import CLOUDS, open_bucket
from dfmcl.release.stores.directory import Directory
from dfmcl.release.stores.store import Store, local_folder

STORES: dict[str, Callable[[str], Store]] = {
    "": lambda address: Directory(Path(address)),
    **dict.fromkeys(CLOUDS, open_bucket),
}
"""Scheme, such as s3 of s3://bucket/models, to the function that opens an address; "" is a path of this machine."""


def store_of(address: str | Path) -> Store:
    """The store at an address; BadInput where its scheme names no kind that is known."""
    return _kind(str(address))(str(address))


def store_at(address: str | Path) -> tuple[Store, str]:
    """The store that holds a folder, and the folder's name in it; BadInput as above.

    On this machine any folder is a store, elsewhere the innermost one above it that holds something.
    """
    kind = _kind(str(address))
    if scheme_of(str(address)):
        return _above(str(address).rstrip("/"), kind)
    path = Path(os.path.normpath(Path(address).absolute()))  # not resolved: a link must not hide where it lies
    return kind(str(path.parent)), path.name


@contextmanager
def local_of(address: str) -> Iterator[Path]:
    """A folder on this machine: the one that a path names, as it names it, or a copy of what lies at an address."""
    if not scheme_of(address):
        yield Path(address)
        return
    store, name = store_at(address)
    with local_folder(store, name) as folder:
        yield folder


def _above(address: str, kind: Callable[[str], Store]) -> tuple[Store, str]:
    parts = address.split("/")
    for length in range(len(parts) - 1, 2, -1):  # the first three are scheme://place
        store = kind("/".join(parts[:length])).now()
        with suppress(FileNotFoundError):
            store.entries()
            return store, "/".join(parts[length:])
    raise BadInput(f"{address}: no repository is there or above; name a model or a version that `dfmcl promote` wrote")


def why_unknown(address: str) -> str:
    """Why an address names no kind of store; empty where it does."""
    scheme = scheme_of(address)
    known = ", ".join(f"{name}://" if name else "paths of this machine" for name in STORES)
    return "" if scheme in STORES else f"{scheme}: is no folder here, and no store that is known; known are {known}"


def _kind(address: str) -> Callable[[str], Store]:
    if why := why_unknown(address):
        raise BadInput(f"{address}: {why}")
    return STORES[scheme_of(address)]
