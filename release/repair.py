"""From a damaged repository back to service: what verifies is served again, and nothing else.

What is served stands in config.pbtxt, what was served in the history, and each version carries its proof: whichever of
them was damaged, the others say what to do.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime

from dfmcl.common.errors import BadInput, DfmclError
from dfmcl.gating.signing.attestation import Trust
from dfmcl.release import layout, ledger, promotion, verification, writer
from dfmcl.release.change import Change
from dfmcl.release.stores.store import Store

UNFIT = (DfmclError, OSError)


@dataclass(frozen=True)
class Repaired:
    """What was found and done. about: a model, or the history; whole: whether it is as it should be now."""

    about: str
    said: str
    whole: bool


def repair(store: Store, trust: Trust, *, name: str | None = None, now: datetime | None = None) -> list[Repaired]:
    """Make every model, or one, serve a version that verifies: the one it should serve, else the last that served.

    A damaged history keeps the lines that can be read. Strangers are named and left alone. BadInput (2) where there is
    no such repository or model; Broken (5) where it cannot be written.
    """
    verification.require_repository(store)
    with writer.only_writer(store, settle=False) as change:
        lost = ledger.salvage(change)
        change.done += [lost] if lost else []
        names = models(store)
        if name is not None and name not in names:
            raise BadInput(f"{store.where(name)}: is no model; models there: {', '.join(names) or 'none'}")
        found = [_repaired(change, each, trust, now) for each in names if name in (None, each)]
        ledger.settle(change)
        ledger.write_aliases(change)
    return [Repaired(layout.HISTORY, lost, True)] * bool(lost) + found


def models(store: Store) -> list[str]:
    """The models that are served, or that promotion made and nobody retired, whole or not."""
    events, _ = ledger.read_lines(store)
    known = {event.model for event in events}
    lost = {name for name in known if ledger.last_served([event for event in events if event.model == name])}
    there = {name for name in layout.folders(store) if verification.is_ours(store, name)}
    return sorted({*layout.model_names(store), *there, *lost})


def _repaired(change: Change, name: str, trust: Trust, now: datetime | None) -> Repaired:
    store = change.store
    if obstacle := _obstacle(store, name):
        return Repaired(name, obstacle, False)
    with suppress(OSError):  # another user's: whether they can be read is seen next
        store.let_read(name)
    try:
        release = verification.verify_release(store, name, trust, now)
        writer.let_gpu_follow(change, name)
        return Repaired(name, f"serves version {release.version}, which is whole", True)
    except UNFIT as error:
        trouble = _why(error)
    unfit = []
    for version in _choices(store, name):
        try:
            verification.verify_version_of(store, f"{name}/{version}", trust, now)
        except UNFIT as error:
            unfit.append(_why(error))
            continue
        promotion.switch(change, name, version, "repaired", trouble)
        return Repaired(name, f"serves version {version} now; it did not before, because {trouble}", True)
    reasons = "; ".join(dict.fromkeys(unfit or [trouble]))
    return Repaired(name, f"no version may be served: {reasons}; promote a candidate", False)


def mendable(store: Store, name: str, trust: Trust | None, now: datetime | None) -> bool:
    """Whether a version of a model may be served, so that `repair` helps once nothing is in its way."""
    for version in _choices(store, name):
        with suppress(*UNFIT):
            verification.verify_version_of(store, f"{name}/{version}", trust, now)
            return True
    return False


def _why(error: Exception) -> str:
    """Without the advice to do what is being done."""
    return str(error).removesuffix(f"; {layout.MEND}")


def _obstacle(store: Store, name: str) -> str:
    """Why a model is left as it is; empty where it may be mended."""
    where = store.where(name)
    if not layout.entry_at(store, name).folder:
        return "its directory is gone; promote a candidate"
    if not verification.is_ours(store, name):
        return f"{where}: promotion did not write this; move it away"
    try:
        foreign = layout.strangers(store, name)
    except OSError as error:
        return f"{where}: cannot be read: {error.strerror or error}"
    if foreign:
        return f"promotion did not write {', '.join(map(store.where, foreign))}; {layout.REMOVE}"
    changes = ledger.events_of(store, name)
    if changes and ledger.last_served(changes) is None and verification.served_or_none(store, name) is None:
        return f"was retired; `dfmcl rollback --name {name} --version N` serves it again"
    return ""


def _choices(store: Store, name: str) -> list[int]:
    """Versions in the order in which they should be served: as configured, as served lately, the newest."""
    changes = ledger.events_of(store, name)
    order = [
        verification.served_or_none(store, name),
        *ledger.served_lately(changes),
        *reversed(layout.version_numbers(store, name)),
    ]
    given_up = ledger.given_up(changes)
    return [version for version in dict.fromkeys(order) if version is not None and version not in given_up]
