"""From a damaged repository back to service: what verifies is served again, and nothing else.

What is served stands in config.pbtxt, what was served in the history, and each version carries its proof: whichever of
them was damaged, the others say what to do.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from dfmcl.common.errors import BadInput, DfmclError
from dfmcl.gating.signing.attestation import Trust
from dfmcl.release import layout, ledger, promotion, verification, writer

UNFIT = (DfmclError, OSError)


@dataclass(frozen=True)
class Repaired:
    """What was found and done. about: a model, or the history; whole: whether it is as it should be now."""

    about: str
    said: str
    whole: bool


def repair(repository: Path, trust: Trust, *, name: str | None = None, now: datetime | None = None) -> list[Repaired]:
    """Make every model, or one, serve a version that verifies: the one it should serve, else the last that served.

    A damaged history keeps the lines that can be read. Strangers are named and left alone. BadInput (2) where there is
    no such repository or model; Broken (5) where it cannot be written.
    """
    verification.require_repository(repository)
    with writer.only_writer(repository, settle=False) as done:
        lost = ledger.salvage(repository)
        done += [lost] if lost else []
        names = models(repository)
        if name is not None and name not in names:
            raise BadInput(f"{repository / name}: is no model; models there: {', '.join(names) or 'none'}")
        found = [_repaired(repository, each, trust, now, done) for each in names if name in (None, each)]
        ledger.settle(repository)
        ledger.write_aliases(repository)
    return [Repaired(layout.HISTORY, lost, True)] * bool(lost) + found


def models(repository: Path) -> list[str]:
    """The models that are served, or that promotion made and nobody retired, whole or not."""
    events, _ = ledger.read_lines(repository)
    known = {event.model for event in events}
    lost = {name for name in known if ledger.last_served([event for event in events if event.model == name])}
    there = {name for name in layout.folders(repository) if verification.is_ours(repository, name)}
    return sorted({*layout.model_names(repository), *there, *lost})


def _repaired(repository: Path, name: str, trust: Trust, now: datetime | None, done: list[str]) -> Repaired:
    model = repository / name
    if obstacle := _obstacle(repository, name):
        return Repaired(name, obstacle, False)
    with suppress(OSError):  # another user's: whether they can be read is seen next
        promotion.let_all_read(model)
    try:
        release = verification.verify_release(repository, name, trust, now)
        writer.let_gpu_follow(model)
        return Repaired(name, f"serves version {release.version}, which is whole", True)
    except UNFIT as error:
        trouble = _why(error)
    unfit = []
    for version in _choices(repository, name):
        try:
            verification.verify_version(model / str(version), trust, now)
        except UNFIT as error:
            unfit.append(_why(error))
            continue
        promotion.switch(repository, name, version, "repaired", done, trouble)
        return Repaired(name, f"serves version {version} now; it did not before, because {trouble}", True)
    reasons = "; ".join(dict.fromkeys(unfit or [trouble]))
    return Repaired(name, f"no version may be served: {reasons}; promote a candidate", False)


def mendable(repository: Path, name: str, trust: Trust | None, now: datetime | None) -> bool:
    """Whether a version of a model may be served, so that `repair` helps once nothing is in its way."""
    for version in _choices(repository, name):
        with suppress(*UNFIT):
            verification.verify_version(repository / name / str(version), trust, now)
            return True
    return False


def _why(error: Exception) -> str:
    """Without the advice to do what is being done."""
    return str(error).removesuffix(f"; {layout.MEND}")


def _obstacle(repository: Path, name: str) -> str:
    """Why a model is left as it is; empty where it may be mended."""
    model = repository / name
    if not model.is_dir():
        return "its directory is gone; promote a candidate"
    if not verification.is_ours(repository, name):
        return f"{model}: promotion did not write this; move it away"
    try:
        foreign = layout.strangers(model)
    except OSError as error:
        return f"{model}: cannot be read: {error.strerror or error}"
    if foreign:
        return f"promotion did not write {', '.join(map(str, foreign))}; remove that and repair again"
    changes = ledger.events_of(repository, name)
    if changes and ledger.last_served(changes) is None and verification.served_or_none(model) is None:
        return f"was retired; `dfmcl rollback --name {name} --version N` serves it again"
    return ""


def _choices(repository: Path, name: str) -> list[int]:
    """Versions in the order in which they should be served: as configured, as served lately, the newest."""
    changes, model = ledger.events_of(repository, name), repository / name
    order = [
        verification.served_or_none(model),
        *ledger.served_lately(changes),
        *reversed(layout.version_numbers(model)),
    ]
    given_up = ledger.given_up(changes)
    return [version for version in dict.fromkeys(order) if version is not None and version not in given_up]
