"""One change of a store, under way: the files as it found them, and its writes so far."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dfmcl.release import layout
from dfmcl.release.stores.store import Etag, Store


class Change:
    """What the one writer of a store does; files that another one wrote since it began are not replaced.

    done: the steps that cannot be taken back, in words, so that the error of a later one tells the truth.
    """

    def __init__(self, store: Store, done: list[str]) -> None:
        self.store, self.done = store, done
        own = (f"{model}/{file}" for model in layout.folders(store) for file in layout.REPLACED)
        self._seen = {name: _etag(store, name) for name in (layout.HISTORY, layout.ALIASES, *own)}

    def replace(self, name: str, text: str, said: str = "") -> None:
        """Write a whole file. said: for `done`."""
        self._seen[name] = self.store.replace(name, text.encode(), self._seen.get(name))
        self.done += [said] if said else []

    def set_aside(self, name: str) -> str:
        """Rename what cannot be replaced; its new name."""
        self._seen[name] = None
        return self.store.set_aside(name)

    @contextmanager
    def added(self, folder: str, said: str) -> Iterator[Path]:
        """As the store has it. said: for `done`."""
        try:
            with self.store.added(folder) as staged:
                yield staged
        except OSError as error:
            if layout.entry_at(self.store, folder).folder and not isinstance(error, FileExistsError):
                self.done.append(said)  # what failed came after it
            raise
        self.done.append(said)

    @contextmanager
    def removed(self, folder: str, said: str) -> Iterator[None]:
        """As the store has it. said: for `done`."""
        try:
            with self.store.removed(folder):
                self.done.append(said)
                yield
        except OSError:
            if said not in self.done and not layout.entry_at(self.store, folder).folder:
                self.done.append(said)
            raise


def _etag(store: Store, name: str) -> Etag | None:
    """None for what is not there, or cannot be seen now: it is no obstacle to changes of other files."""
    try:
        return store.etag(name)
    except OSError:
        return None
