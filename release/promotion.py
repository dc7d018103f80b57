"""From a passing verdict to a version that Triton serves, and back: all of it or nothing, and only what passed."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from datetime import datetime
from functools import partial
from pathlib import Path

from dfmcl.common.errors import BadInput, Refused
from dfmcl.gating.signing.attestation import Trust, require_covered, sign_model, verify
from dfmcl.gating.signing.evidence import inspect
from dfmcl.gating.signing.signer import Signer
from dfmcl.release import layout, ledger
from dfmcl.release.candidate import FILES, MANIFEST, Manifest, verify_files
from dfmcl.release.change import Change
from dfmcl.release.stores.directory import Directory
from dfmcl.release.stores.store import Store
from dfmcl.release.verification import (
    Promoted,
    is_ours,
    require_model,
    require_no_strangers,
    require_repository,
    require_served,
    served_or_none,
    verify_release,
    verify_version_of,
)
from dfmcl.release.writer import only_writer


def promote(
    candidate: Path,
    evidence: Path,
    store: Store,
    *,
    name: str,
    trust: Trust,
    threads: int | None = None,
    shadow: bool = False,
    now: datetime | None = None,
    signer: Signer | None = None,
) -> Promoted:
    """Add a candidate that passed the gate as the next version of model `name`, and make it the one that is served.

    A crash at any point leaves the old version served, or the new one; nothing in between is visible to Triton.
    threads: of ONNX Runtime per inference on a CPU; default: as the served version has it, else its own choice.
    signer: writes model.sig, which then need not be there before. Default: it is taken along from the evidence.
    shadow: beside the served version, as a model NAME-shadow of its own; promoting the same bytes later retires it.
    BadInput or BadEvidence (2): a file that is missing, malformed or not what the candidate's manifest says. Refused
    or NotAttested (1): no passing verdict for exactly these bytes that keys of `trust` have signed and that holds at
    `now` (default: now), or another interface than the version that is served. Broken (5): the repository cannot be
    written.
    """
    if layout.checked_name(name).endswith(layout.SHADOW):
        raise BadInput(f"model name {name!r}: ends as the shadow of another model; name that one and --shadow")
    # First, so that a fault has the code that `dfmcl verify` gives it; what is signed here cannot be asked for before.
    asked = trust if signer is None else replace(trust, model_keys=())
    if asked.keys or asked.model_keys:
        verify(candidate, evidence, asked, now)
    else:
        inspect(candidate, evidence)
    manifest = verify_files(candidate)
    stage = partial(_stage_version, candidate, evidence, trust, now, signer)
    with only_writer(store) as change:
        _require_same_interface(store, manifest, name)
        if not shadow:
            promoted = _commit(change, name, manifest, stage, threads)
            _retire_shadow(change, promoted)
            return promoted
        if layout.served_version(store, name) is None:
            raise BadInput(
                f"model {name!r}: is not served, so that nothing can stand in its shadow; promote without it"
            )
        return _commit(change, layout.checked_name(f"{name}{layout.SHADOW}"), manifest, stage, threads)


def rollback(
    store: Store,
    name: str,
    *,
    trust: Trust,
    version: int | None = None,
    reason: str = "",
    now: datetime | None = None,
) -> Promoted:
    """Serve an earlier version of model `name` again; default: the one before. Twice is where one began.

    BadInput (2): no such version. Refused or NotAttested (1): there was none before, or its attestation does not hold
    at `now`: an expired one needs a new verdict. Broken (5): the repository cannot be written.
    """
    require_repository(store)
    _require_printable(reason)
    with only_writer(store) as change:
        if version is None:
            served = require_served(store, name)
            version = ledger.aliases(store)[name].previous
            if version is None:
                raise Refused(f"model {name!r}: nothing was served before version {served}; name one with --version")
        require_model(store, name)
        require_no_strangers(store, name)
        if version not in (there := layout.version_numbers(store, name)):
            on_disk = ", ".join(map(str, there))
            raise BadInput(f"model {name!r}: has no version {version}; on disk are {on_disk or 'none'}")
        verify_version_of(store, f"{name}/{version}", trust, now)
        return switch(change, name, version, "rolled_back", reason)


def give_back(store: Store, name: str, version: int, reason: str, *, instead_of: int | None = None) -> Promoted | None:
    """Return to a version that was live a moment ago, as the one after it is not trusted or answers otherwise.

    instead_of: that one; None, and nothing is done, where another was promoted meanwhile.
    """
    require_repository(store)
    with only_writer(store) as change:
        served = require_served(store, name)
        if instead_of not in (None, served):
            return None
        return switch(change, name, version, "returned", reason)


def note_failure(store: Store, promoted: Promoted, reason: str) -> None:
    """Write down that a version cannot be served, where nothing else is there to return to."""
    require_repository(store)
    with only_writer(store) as change:
        event = ledger.event(promoted.model, "failed", promoted.version, promoted.version, promoted.sha256, reason)
        ledger.record(change, [event])


def note_success(store: Store, promoted: Promoted) -> None:
    """Write down that a version is served after all, where the last that was written is that it cannot be."""
    if ledger.failed(store, promoted.model) != promoted.version:
        return
    with only_writer(store) as change:
        event = ledger.event(
            promoted.model, "recovered", promoted.version, None, promoted.sha256, "a server serves it now"
        )
        ledger.record(change, [event])


def given_up(store: Store, promoted: Promoted) -> str:
    """Why a version will not be served; empty while it may."""
    changes = [change for change in ledger.read_history(store, promoted.model) if change.event != "pruned"]
    about = [change for change in changes if change.before == promoted.version]
    if not about:  # nobody has written that yet, or storage is away for a moment
        return ""
    last = about[-1]
    if last == changes[-1] and last.event in ("failed", "retired"):
        return last.reason or "it was retired"
    if layout.served_version(store, promoted.model) in (promoted.version, None):
        return ""
    return last.reason or "another version is served"


def retire(store: Store, name: str, *, reason: str = "") -> None:
    """Take a model out of service, all its versions with it; its numbers stay taken. BadInput where there is none.

    Also a damaged one: its version need not be known to take it away.
    """
    require_repository(store)
    _require_printable(reason)
    with only_writer(store) as change:
        require_model(store, name)
        _retire(change, name, reason)
        shadow = f"{name}{layout.SHADOW}"
        if is_ours(store, shadow):
            _retire(change, shadow, f"{name} was retired")


def prune(store: Store, name: str, *, keep: int = 3) -> list[int]:
    """Remove old versions beyond the newest `keep`, never what is served or was before it; the numbers removed.

    Not while anything is wrong with the model: an old version may be what brings it back.
    """
    require_repository(store)
    with only_writer(store) as change:
        require_served(store, name)
        served = verify_release(store, name).version
        previous = ledger.aliases(store)[name].previous
        versions = layout.version_numbers(store, name)
        old = [number for number in versions[: len(versions) - keep] if number not in (served, previous)]
        for number in old:
            with change.removed(f"{name}/{number}", f"{name} version {number} was removed"):
                ledger.record(change, [ledger.event(name, "pruned", number, None, None)])
        return old


def _require_printable(reason: str) -> None:
    """A reason is shown on terminals for years; line ends become spaces, but nothing in it may act there."""
    if bad := [sign for sign in " ".join(reason.split()) if not sign.isprintable()]:
        raise BadInput(f"--reason: holds {bad[0]!a}, which does not print; write plain text")


def _commit(
    change: Change, name: str, manifest: Manifest, stage: Callable[[Path], None], threads: int | None
) -> Promoted:
    store = change.store
    new = not layout.taken(store, name)
    if not new:
        if not is_ours(store, name):
            raise BadInput(f"{store.where(name)}: promotion did not write this; move it away, or take another name")
        require_no_strangers(store, name)
    if threads is None:
        threads = _threads(store, name)
    version = 1 + max([0, *layout.version_numbers(store, name), *ledger.versions_remembered(store, name)])
    if not new:
        with change.added(f"{name}/{version}", f"{name} version {version} lies there") as staged:
            stage(staged)
        return switch(change, name, version, "promoted", threads=threads)
    with change.added(name, f"{name} version {version} is served") as staged:
        stage(staged / str(version))
        decider = layout.decider_at(Directory(staged), str(version))
        for path, text in layout.configs(manifest, name, version, threads=threads, decider=decider).items():
            (staged / path).parent.mkdir(exist_ok=True)
            (staged / path).write_text(text, encoding="utf-8")
    ledger.record(change, [ledger.event(name, "promoted", version, None, manifest.model_sha256)])
    return Promoted(name, version, store, manifest.model_sha256)


def _threads(store: Store, name: str) -> int:
    """As the model's config has it; ONNX Runtime's own choice where it cannot be read."""
    return 0 if served_or_none(store, name) is None else layout.threads_of(store, name)


def switch(
    change: Change, name: str, version: int, kind: ledger.Kind, reason: str = "", threads: int | None = None
) -> Promoted:
    """Make a version that lies there the one that is served."""
    store = change.store
    manifest = layout.manifest_of(store, name, version)
    served = _served_until_now(store, name)
    threads = _threads(store, name) if threads is None else threads
    decider = layout.decider_at(store, f"{name}/{version}")
    for path, text in layout.configs(manifest, name, version, threads=threads, decider=decider).items():
        change.replace(f"{name}/{path}", text, f"{name}/{path} names version {version}")  # the last is the commit
    ledger.record(change, [ledger.event(name, kind, version, served, manifest.model_sha256, reason)])
    return Promoted(name, version, store, manifest.model_sha256)


def _served_until_now(store: Store, name: str) -> int | None:
    """As the config says, or where that is damaged, the history."""
    served = served_or_none(store, name)
    return ledger.last_served(ledger.events_of(store, name)) if served is None else served


def _retire_shadow(change: Change, promoted: Promoted) -> None:
    """The same bytes need no shadow once they are served; other bytes stay there."""
    store, shadow = change.store, f"{promoted.model}{layout.SHADOW}"
    version = served_or_none(store, shadow)
    with suppress(BadInput):  # a damaged shadow is no reason to fail, and stays for `dfmcl repair`
        if version is None or layout.manifest_of(store, shadow, version).model_sha256 != promoted.sha256:
            return
        _retire(change, shadow, f"{promoted.model} serves it as version {promoted.version}")


def _retire(change: Change, name: str, reason: str) -> None:
    """Written down first: a server ends a model by the history alone, and would keep one whose retirement was cut short
    before it. What was written down and not done, the next change finds (`ledger.settle`)."""
    served = _served_until_now(change.store, name)
    ledger.append(change, [ledger.event(name, "retired", None, served, None, reason)])
    change.done.append(f"{name} was written down as retired")
    with change.removed(name, f"{name} is out of service"):
        ledger.write_aliases(change)


def _require_same_interface(store: Store, new: Manifest, name: str) -> None:
    old = _last_manifest(store, name)
    if old is not None and new.interface != old.interface:
        raise Refused(
            f"model {name!r} takes {old.input_shape} and has {len(old.labels)} labels; this candidate takes "
            f"{new.input_shape} and has {len(new.labels)}, or other names: promote it under another name"
        )


def _last_manifest(store: Store, name: str) -> Manifest | None:
    """Of the version that is served, or where that is damaged, of the newest one that can be read."""
    for version in (served_or_none(store, name), *reversed(layout.version_numbers(store, name))):
        with suppress(BadInput):
            return layout.manifest_of(store, name, version)
    return None


def _stage_version(
    candidate: Path,
    evidence: Path,
    trust: Trust,
    now: datetime | None,
    signer: Signer | None,
    directory: Path,
) -> None:
    """Copy what belongs into a version, and nothing else; then judge the copies, as the sources may have changed.

    candidate, evidence: where from.
    trust, now: by which the copies are judged.
    signer: of model.sig; None: a copy of the evidence's, if there is one.
    directory: the version's.
    """
    directory.mkdir(exist_ok=True)
    sources = [candidate / name for name in sorted({*FILES, MANIFEST})]
    signature = evidence / layout.SIGNATURE
    taken = [signature] if signer is None and signature.is_file() else []
    for source in [*sources, *(evidence / name for name in sorted(layout.EVIDENCE)), *taken]:
        if not source.is_file():
            raise BadInput(f"{source}: no such file; `dfmcl gate` writes it")
        with source.open("rb") as reader, (directory / source.name).open("xb") as writer:
            shutil.copyfileobj(reader, writer)
    verify_files(directory)
    if signer is not None:
        sign_model(directory, signer)
    elif taken:
        require_covered(directory)
    verify(directory, directory, trust, now)
