"""One writer at a time in a repository, who first makes good what a killed one left out."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress

from dfmcl.common.errors import BadInput, Broken
from dfmcl.release import layout, ledger
from dfmcl.release.change import Change
from dfmcl.release.stores.store import Store, UnusableStore, told


@contextmanager
def only_writer(store: Store, *, settle: bool = True) -> Iterator[Change]:
    """Be the one writer, once what others left behind when they died is made good.

    settle: whether what they did not write down is written down first, which a damaged history forbids.
    """
    done: list[str] = []
    try:
        with store.writing():
            change = Change(store, done)
            if settle:
                for name in layout.model_names(store):
                    with suppress(BadInput):  # a damaged model is no reason to hold up the others
                        let_gpu_follow(change, name)
                ledger.settle(change)
            yield change
    except UnusableStore as error:
        raise told(error, str(error)) from None
    except OSError as error:
        partly = done and not store.whole
        state = f"before that, {', '.join(done)}; repeat the command" if partly else "nothing was changed"
        raise Broken(f"{error.filename or store.where()}: {error.strerror or error}; {state}") from None


def let_gpu_follow(change: Change, name: str) -> None:
    """Where a writer died between the two configs, the one that is the commit decides."""
    store = change.store
    version = layout.served_version(store, name)
    manifest, decider = layout.manifest_of(store, name, version), layout.decider_at(store, f"{name}/{version}")
    threads = 0 if decider == layout.DEFAULT else layout.threads_of(store, name)
    text = layout.configs(manifest, name, int(version or 0), threads=threads, decider=decider)[layout.GPU_CONFIG]
    try:
        whole = layout.config_bytes(store, name, layout.GPU_CONFIG) == text.encode()
    except BadInput:
        whole = False
    if not whole:
        change.replace(f"{name}/{layout.GPU_CONFIG}", text)
