"""From a passing verdict to a version that Triton serves, and back: all of it or nothing, and only what passed."""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import IO

from dfmcl.common.errors import BadInput, Broken, Refused
from dfmcl.common.reader import leaves
from dfmcl.gating.signing.attestation import Trust, inspect, verify
from dfmcl.release import layout, ledger
from dfmcl.release.candidate import FILES, MANIFEST, Manifest, read_manifest, verify_files

LOCK = ".promotion.lock"
# As other locks: not through a link, whose file would be emptied, and waiting at no pipe.
OPEN = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
LOCK_SECONDS = 30.0  # a promotion holds it for a second or two


@dataclass(frozen=True)
class Promoted:
    """A version in the repository. path: its directory; sha256: of its model.onnx."""

    model: str
    version: int
    path: Path
    sha256: str


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
            served = _require_served(repository, name)
            version = ledger.aliases(repository)[name].previous
            if version is None:
                raise Refused(f"model {name!r}: nothing was served before version {served}; name one with --version")
        _require_model(repository, name)
        _require_no_strangers(repository / name)
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
        served = _require_served(repository, name)
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
        _require_model(repository, name)
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
        _require_served(repository, name)
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


def verify_release(repository: Path, name: str, trust: Trust | None = None, now: datetime | None = None) -> Promoted:
    """What Triton would serve as `name`; Refused, NotAttested or BadEvidence where promotion did not write it.

    trust: whose signatures must vouch for it at `now` (default: now). Without it layout, digests and verdict are judged
    as they lie there: that finds what broke or was swapped by mistake, not who wrote the report.
    """
    model = repository / name
    if not model.is_dir():
        raise BadInput(f"{model}: no such model; there are {', '.join(layout.model_names(repository)) or 'none'}")
    if leaves(model):
        raise Refused(f"{model}: is a link out of the repository; promotion did not write this")
    version = layout.served_version(model)
    if version is None:
        raise Refused(f"{model}: has no {layout.CONFIG}; {layout.MEND}")
    _require_no_strangers(model)
    for path in [model / layout.CONFIG, *model.glob(layout.GPU_CONFIG)]:
        # The GPU's may still be an older version's, where a promotion was cut short.
        number = layout.served_version(model, str(path.relative_to(model)))
        directory = model / str(number)
        manifest = verify_version(directory, trust, now)
        layout.require_ours(path, manifest, name, int(number or 0))
    return Promoted(name, version, model / str(version), read_manifest(model / str(version)).model_sha256)


def verify_version(directory: Path, trust: Trust | None = None, now: datetime | None = None) -> Manifest:
    """The manifest of a version that is whole and vouched for; as for a release, which has a config besides."""
    if not layout.is_version(directory):
        raise Refused(f"{directory}: is no version's directory, or is gone; {layout.MEND}")
    if extra := sorted({path.name for path in directory.iterdir()} - layout.VERSION_FILES):
        raise Refused(f"{directory / extra[0]}: promotion did not write this; remove it")
    if absent := [file for file in sorted(layout.VERSION_FILES) if not (directory / file).is_file()]:
        raise Refused(f"{directory / absent[0]}: promotion writes this, and it is missing; {layout.MEND}")
    if trust is None:
        inspect(directory, directory)
    else:
        verify(directory, directory, trust, now)
    return verify_files(directory)


def verify_path(path: Path, trust: Trust, now: datetime | None = None) -> Path:
    """The version that a path names, verified: a model in a repository, one of its versions, or a copy of one."""
    path = Path(os.path.normpath(path.absolute()))  # not resolved: a link must not hide where it lies
    if (path / layout.CONFIG).is_file():
        return verify_release(path.parent, path.name, trust, now).path
    if layout.VERSION.fullmatch(path.name) and (path.is_symlink() or (path.parent / layout.CONFIG).exists()):
        verify_version(path, trust, now)
    return path


def _require_no_strangers(model: Path) -> None:
    if found := layout.strangers(model):
        more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
        raise Refused(f"{found[0]}: promotion did not write this{more}; remove it")


def _require_printable(reason: str) -> None:
    """A reason is shown on terminals for years; line ends become spaces, but nothing in it may act there."""
    if bad := [sign for sign in " ".join(reason.split()) if not sign.isprintable()]:
        raise BadInput(f"--reason: holds {bad[0]!a}, which does not print; write plain text")


def require_repository(repository: Path) -> None:
    """BadInput where there is no such directory: a typing error must not look like an empty repository."""
    if not repository.is_dir():
        raise BadInput(f"{repository}: no such directory; name a model repository that `dfmcl promote` wrote")
    try:
        next(repository.iterdir(), None)
    except OSError as error:
        raise BadInput(f"{repository}: cannot be read: {error.strerror or error}") from None


def is_ours(repository: Path, name: str) -> bool:
    """Whether promotion made a model's directory, whatever has been damaged in it since."""
    model = repository / name
    if not model.is_dir() or leaves(model):
        return False
    if any((model / str(number) / MANIFEST).exists() for number in layout.version_numbers(model)):
        return True
    return ledger.last_served(ledger.events_of(repository, name)) is not None


def served_or_none(model: Path) -> int | None:
    """The version that a model's config.pbtxt names; None where it names none, for whatever reason."""
    try:
        return layout.served_version(model)
    except BadInput:
        return None


def _require_served(repository: Path, name: str) -> int:
    _require_model(repository, name)
    version = layout.served_version(repository / name)
    if version is None:
        raise BadInput(f"{repository / name}: has no {layout.CONFIG}; {layout.MEND}")
    return version


def _require_model(repository: Path, name: str) -> None:
    if not is_ours(repository, layout.checked_name(name)):
        known = ", ".join(layout.model_names(repository)) or "none"
        raise BadInput(f"{repository / name}: is not served; models there: {known}")


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
        _require_no_strangers(model)
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


def _make_readable(directory: Path) -> None:
    directory.mkdir(exist_ok=True)
    directory.chmod(0o755)


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
        _make_readable((model / path).parent)
        ledger.replace(model / path, text)  # the last of them is the commit
        done.append(f"{name}/{path} names version {version}")
    ledger.record(repository, [ledger.event(name, kind, version, served, manifest.model_sha256, reason)])
    return promoted


def _served_until_now(repository: Path, name: str) -> int | None:
    """As the config says, or where that is damaged, the history."""
    served = served_or_none(repository / name)
    return ledger.last_served(ledger.events_of(repository, name)) if served is None else served


def let_gpu_follow(model: Path) -> None:
    """Where a writer died between the two configs, the one that is the commit decides."""
    version, path = layout.served_version(model), model / layout.GPU_CONFIG
    text = layout.configs(read_manifest(model / str(version)), model.name, int(version or 0))[layout.GPU_CONFIG]
    if not path.is_file() or path.read_bytes() != text.encode():
        _make_readable(path.parent)
        ledger.replace(path, text)


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


@contextmanager
def only_writer(repository: Path, *, settle: bool = True) -> Iterator[list[str]]:
    """Hold the repository's lock, and make good what writers that died left behind.

    Yields a list that a change adds to with each step that cannot be taken back, so that the error of a later one tells
    the truth. settle: whether what dead writers did not write down is written down first, which a damaged history
    forbids.
    """
    done: list[str] = []
    try:
        repository.mkdir(parents=True, exist_ok=True)
        with _locked(repository):
            _clear_staging(repository)
            if settle:
                for name in layout.model_names(repository):
                    with suppress(BadInput):  # a damaged model is no reason to hold up the others
                        let_gpu_follow(repository / name)
                ledger.settle(repository)
            yield done
    except OSError as error:
        state = f"before that, {', '.join(done)}; repeat the command" if done else "nothing was changed"
        raise Broken(f"{error.filename or repository}: {error.strerror or error}; {state}") from None


def _clear_staging(repository: Path) -> None:
    for stale in [path for depth in ("", "*/", "*/*/") for path in repository.glob(f"{depth}{layout.STAGING}*")]:
        if stale.is_dir() and not stale.is_symlink():
            shutil.rmtree(stale)
        else:
            stale.unlink(missing_ok=True)


@contextmanager
def _locked(repository: Path) -> Iterator[None]:
    """Hold the file that says who may write; anew where a user removed it meanwhile, as two would hold two files."""
    path, deadline = repository / LOCK, time.monotonic() + LOCK_SECONDS
    while True:
        with os.fdopen(os.open(path, OPEN, 0o666), "w") as lock:
            _take(lock, repository, deadline)
            if _is_file_at(lock, path):
                yield
                return


def _is_file_at(file: IO[str], path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def _take(lock: IO[str], repository: Path, deadline: float) -> None:
    """Wait for the process that changes the repository, but not for ever."""
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise Broken(
                    f"{repository}: is being changed for {LOCK_SECONDS:g} s by another process; try later"
                ) from None
            time.sleep(0.05)  # flock has no deadline of its own
