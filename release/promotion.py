"""From a passing verdict to a version that Triton serves, and back: all of it or nothing, and only what passed."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable
from contextlib import suppress
from datetime import datetime
from functools import partial
from pathlib import Path

from dfmcl.common.errors import BadInput, Refused
from dfmcl.gating.signing.attestation import Trust, verify
from dfmcl.release import layout, ledger
from dfmcl.release.candidate import FILES, MANIFEST, Manifest, read_manifest, verify_files
from dfmcl.release.verification import (
    Promoted,
    is_ours,
    require_model,
    require_no_strangers,
    require_repository,
    require_served,
    served_or_none,
    verify_release,
    verify_version,
)
from dfmcl.release.writer import make_readable, only_writer


def promote(
    candidate: Path,
    evidence: Path,
    repository: Path,
    *,
    name: str,
    trust: Trust,
    threads: int | None = None,
    shadow: bool = False,
    now: datetime | None = None,
) -> Promoted:
    """Add a candidate that passed the gate as the next version of model `name`, and make it the one that is served.

    A crash at any point leaves the old version served, or the new one; nothing in between is visible to Triton.
    threads: of ONNX Runtime per inference on a CPU; default: as the served version has it, else its own choice.
    shadow: beside the served version, as a model NAME-shadow of its own; promoting the same bytes later retires it.
    BadInput or BadEvidence (2): a file that is missing, malformed or not what the candidate's manifest says. Refused
    or NotAttested (1): no passing verdict for exactly these bytes that keys of `trust` have signed and that holds at
    `now` (default: now), or another interface than the version that is served. Broken (5): the repository cannot be
    written.
    """
    if layout.checked_name(name).endswith(layout.SHADOW):
        raise BadInput(f"model name {name!r}: ends as the shadow of another model; name that one and --shadow")
    verify(candidate, evidence, trust, now)  # first, so that a fault has the code that `dfmcl verify` gives it
    manifest = verify_files(candidate)
    stage = partial(_stage_version, candidate, evidence, trust, now)
    with only_writer(repository) as done:
        _require_same_interface(repository, manifest, name)
        if not shadow:
            promoted = _commit(repository, name, manifest, stage, threads, done)
            _retire_shadow(repository, promoted, done)
            return promoted
        if layout.served_version(repository / name) is None:
            raise BadInput(
                f"model {name!r}: is not served, so that nothing can stand in its shadow; promote without it"
            )
        return _commit(repository, layout.checked_name(f"{name}{layout.SHADOW}"), manifest, stage, threads, done)


def rollback(
    repository: Path,
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
    require_repository(repository)
    _require_printable(reason)
    with only_writer(repository) as done:
        if version is None:
            served = require_served(repository, name)
            version = ledger.aliases(repository)[name].previous
            if version is None:
                raise Refused(f"model {name!r}: nothing was served before version {served}; name one with --version")
        require_model(repository, name)
        require_no_strangers(repository / name)
        directory = repository / name / str(version)
        if not layout.is_version(directory):
            on_disk = ", ".join(map(str, layout.version_numbers(repository / name)))
            raise BadInput(f"model {name!r}: has no version {version}; on disk are {on_disk or 'none'}")
        verify_version(directory, trust, now)
        return switch(repository, name, version, "rolled_back", done, reason)


def give_back(
    repository: Path, name: str, version: int, reason: str, *, instead_of: int | None = None
) -> Promoted | None:
    """Return to a version that was live a moment ago, as the one after it is not trusted or answers otherwise.

    instead_of: that one; None, and nothing is done, where another was promoted meanwhile.
    """
    require_repository(repository)
    with only_writer(repository) as done:
        served = require_served(repository, name)
        if instead_of not in (None, served):
            return None
        return switch(repository, name, version, "returned", done, reason)


def note_failure(repository: Path, promoted: Promoted, reason: str) -> None:
    """Write down that a version cannot be served, where nothing else is there to return to."""
    require_repository(repository)
    with only_writer(repository):
        change = ledger.event(promoted.model, "failed", promoted.version, promoted.version, promoted.sha256, reason)
        ledger.record(repository, [change])


def note_success(repository: Path, promoted: Promoted) -> None:
    """Write down that a version is served after all, where the last that was written is that it cannot be."""
    if ledger.failed(repository, promoted.model) != promoted.version:
        return
    with only_writer(repository):
        change = ledger.event(
            promoted.model, "recovered", promoted.version, None, promoted.sha256, "a server serves it now"
        )
        ledger.record(repository, [change])


def given_up(repository: Path, promoted: Promoted) -> str:
    """Why a version will not be served; empty while it may."""
    changes = [change for change in ledger.read_history(repository, promoted.model) if change.event != "pruned"]
    about = [change for change in changes if change.before == promoted.version]
    if not about:  # nobody has written that yet, or storage is away for a moment
        return ""
    last = about[-1]
    if last == changes[-1] and last.event in ("failed", "retired"):
        return last.reason or "it was retired"
    if layout.served_version(repository / promoted.model) in (promoted.version, None):
        return ""
    return last.reason or "another version is served"


def retire(repository: Path, name: str, *, reason: str = "") -> None:
    """Take a model out of service, all its versions with it; its numbers stay taken. BadInput where there is none.

    Also a damaged one: its version need not be known to take it away.
    """
    require_repository(repository)
    _require_printable(reason)
    with only_writer(repository) as done:
        require_model(repository, name)
        _retire(repository, name, reason, done)
        shadow = f"{name}{layout.SHADOW}"
        if is_ours(repository, shadow):
            _retire(repository, shadow, f"{name} was retired", done)


def prune(repository: Path, name: str, *, keep: int = 3) -> list[int]:
    """Remove old versions beyond the newest `keep`, never what is served or was before it; the numbers removed.

    Not while anything is wrong with the model: an old version may be what brings it back.
    """
    require_repository(repository)
    with only_writer(repository) as done:
        require_served(repository, name)
        served = verify_release(repository, name).version
        previous = ledger.aliases(repository)[name].previous
        versions = layout.version_numbers(repository / name)
        old = [number for number in versions[: len(versions) - keep] if number not in (served, previous)]
        for number in old:
            # Out of Triton's sight at once; the lock's next holder removes what a crash leaves.
            removed = Path(tempfile.mkdtemp(prefix=layout.STAGING, dir=repository / name))
            (repository / name / str(number)).rename(removed / str(number))
            done.append(f"{name} version {number} was removed")
            ledger.record(repository, [ledger.event(name, "pruned", number, None, None)])
            shutil.rmtree(removed)
        return old


def _require_printable(reason: str) -> None:
    """A reason is shown on terminals for years; line ends become spaces, but nothing in it may act there."""
    if bad := [sign for sign in " ".join(reason.split()) if not sign.isprintable()]:
        raise BadInput(f"--reason: holds {bad[0]!a}, which does not print; write plain text")


def _commit(
    repository: Path,
    name: str,
    manifest: Manifest,
    stage: Callable[[Path], None],
    threads: int | None,
    done: list[str],
) -> Promoted:
    model = repository / name
    new = not model.exists()
    if not new:
        if not is_ours(repository, name):
            raise BadInput(f"{model}: promotion did not write this; move it away, or take another name")
        require_no_strangers(model)
    if threads is None:
        threads = _threads(model)
    version = 1 + max([0, *layout.version_numbers(model), *ledger.versions_remembered(repository, name)])
    configs = layout.configs(manifest, name, version, threads=threads)
    # A first version is staged where it appears. Later ones inside the model's directory, as Triton without explicit
    # model control takes every directory of the repository for a model.
    staged = Path(tempfile.mkdtemp(prefix=layout.STAGING, dir=repository if new else model))
    try:
        stage(staged / str(version))
        if new:
            for path, text in configs.items():
                (staged / path).parent.mkdir(exist_ok=True)
                ledger.write(staged / path, text)
            let_all_read(staged)
            ledger.sync(staged)
            staged.rename(model)  # the commit
            done.append(f"{name} version {version} is served")
            ledger.sync(repository)
        else:
            let_all_read(staged / str(version))
            (staged / str(version)).rename(model / str(version))
            done.append(f"{name} version {version} lies there")
            ledger.sync(model)
    finally:
        shutil.rmtree(staged, ignore_errors=True)
    if new:
        change = ledger.event(name, "promoted", version, None, manifest.model_sha256)
        ledger.record(repository, [change])
        return Promoted(name, version, model / str(version), manifest.model_sha256)
    return switch(repository, name, version, "promoted", done, threads=threads)


def _threads(model: Path) -> int:
    """As the model's config has it; ONNX Runtime's own choice where it cannot be read."""
    return 0 if served_or_none(model) is None else layout.threads_of(model)


def let_all_read(directory: Path) -> None:
    """Triton may run as another user than the one who promotes, whatever that one's umask is."""
    for path in [directory, *directory.rglob("*")]:
        if not path.is_symlink():  # the file behind one is not ours
            path.chmod(0o755 if path.is_dir() else 0o644)


def switch(
    repository: Path,
    name: str,
    version: int,
    kind: ledger.Kind,
    done: list[str],
    reason: str = "",
    threads: int | None = None,
) -> Promoted:
    """Make a version that lies there the one that is served.

    done: what was changed already, to be told where a later step fails.
    """
    model = repository / name
    manifest = read_manifest(model / str(version))
    promoted = Promoted(name, version, model / str(version), manifest.model_sha256)
    served = _served_until_now(repository, name)
    threads = _threads(model) if threads is None else threads
    for path, text in layout.configs(manifest, name, version, threads=threads).items():
        make_readable((model / path).parent)
        ledger.replace(model / path, text)  # the last of them is the commit
        done.append(f"{name}/{path} names version {version}")
    ledger.record(repository, [ledger.event(name, kind, version, served, manifest.model_sha256, reason)])
    return promoted


def _served_until_now(repository: Path, name: str) -> int | None:
    """As the config says, or where that is damaged, the history."""
    served = served_or_none(repository / name)
    return ledger.last_served(ledger.events_of(repository, name)) if served is None else served


def _retire_shadow(repository: Path, promoted: Promoted, done: list[str]) -> None:
    """The same bytes need no shadow once they are served; other bytes stay there."""
    shadow = f"{promoted.model}{layout.SHADOW}"
    version = served_or_none(repository / shadow)
    with suppress(BadInput):  # a damaged shadow is no reason to fail, and stays for `dfmcl repair`
        if version is None or read_manifest(repository / shadow / str(version)).model_sha256 != promoted.sha256:
            return
        _retire(repository, shadow, f"{promoted.model} serves it as version {promoted.version}", done)


def _retire(repository: Path, name: str, reason: str, done: list[str]) -> None:
    """Written down first: a server ends a model by the history alone, and would keep one whose retirement was cut short
    before it. What was written down and not done, the next change finds (`ledger.settle`)."""
    served = _served_until_now(repository, name)
    ledger.append(repository, [ledger.event(name, "retired", None, served, None, reason)])
    done.append(f"{name} was written down as retired")
    removed = Path(tempfile.mkdtemp(prefix=layout.STAGING, dir=repository))
    (repository / name).rename(removed / name)
    done.append(f"{name} is out of service")
    ledger.sync(repository)
    ledger.write_aliases(repository)
    shutil.rmtree(removed, ignore_errors=True)


def _require_same_interface(repository: Path, new: Manifest, name: str) -> None:
    old = _last_manifest(repository, name)
    if old is not None and new.interface != old.interface:
        raise Refused(
            f"model {name!r} takes {old.input_shape} and has {len(old.labels)} labels; this candidate takes "
            f"{new.input_shape} and has {len(new.labels)}, or other names: promote it under another name"
        )


def _last_manifest(repository: Path, name: str) -> Manifest | None:
    """Of the version that is served, or where that is damaged, of the newest one that can be read."""
    model = repository / name
    for version in (served_or_none(model), *reversed(layout.version_numbers(model))):
        with suppress(BadInput):
            return read_manifest(model / str(version))
    return None


def _stage_version(candidate: Path, evidence: Path, trust: Trust, now: datetime | None, directory: Path) -> None:
    """Copy what belongs into a version, and nothing else; then judge the copies, as the sources may have changed."""
    directory.mkdir()
    sources = [candidate / name for name in sorted({*FILES, MANIFEST})]
    for source in [*sources, *(evidence / name for name in sorted(layout.EVIDENCE))]:
        if not source.is_file():
            raise BadInput(f"{source}: no such file; `dfmcl gate` writes it")
        with source.open("rb") as reader, (directory / source.name).open("xb") as writer:
            shutil.copyfileobj(reader, writer)
            writer.flush()
            os.fsync(writer.fileno())
    ledger.sync(directory)
    verify_files(directory)
    verify(directory, directory, trust, now)
