"""From a passing verdict to a version that Triton serves: all of it or nothing, and only what passed."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

from gating.attestation import Trust, inspect, verify
from serving import repository as layout
from serving.candidate import FILES, MANIFEST, Manifest, read_manifest, verify_files
from serving.errors import BadInput, Broken, Refused

STAGING = ".staging-"
LOCK = ".promotion.lock"


@dataclass(frozen=True)
class Promoted:
    """A version in the repository. path: its directory; sha256: of its model.onnx."""

    model: str
    version: int
    path: Path
    sha256: str


def promote(
    candidate: Path, evidence: Path, repository: Path, *, name: str, trust: Trust, now: datetime | None = None
) -> Promoted:
    """Add a candidate that passed the gate as the next version of model `name`, and make it the one that is served.

    A crash at any point leaves the old version served, or the new one; nothing in between is visible to Triton.
    BadInput or BadEvidence (2): a file that is missing, malformed or not what the candidate's manifest says. Refused
    or NotAttested (1): no passing verdict for exactly these bytes that keys of `trust` have signed and that holds at
    `now` (default: now), or another interface than the version that is served. Broken (5): the repository cannot be
    written.
    """
    layout.checked_name(name)
    manifest = verify_files(candidate)
    if extra := sorted({path.name for path in candidate.iterdir()} - FILES - {MANIFEST}):
        raise BadInput(f"{candidate / extra[0]}: not part of a candidate; remove it or export again")
    verify(candidate, evidence, trust, now)
    try:
        with _only_writer(repository):
            return _commit(repository, name, manifest, partial(_stage_version, candidate, evidence, trust, now))
    except OSError as error:
        raise Broken(f"{repository}: cannot be written: {error.strerror or error}") from None


def verify_release(repository: Path, name: str, trust: Trust | None = None, now: datetime | None = None) -> Promoted:
    """What Triton would serve as `name`; Refused, NotAttested or BadEvidence where promotion did not write it.

    trust: whose signatures must vouch for it at `now` (default: now). Without it layout, digests and verdict are judged
    as they lie there: that finds what broke or was swapped by mistake, not who wrote the report.
    """
    model = repository / name
    version = layout.served_version(model)
    if version is None:
        raise Refused(f"{model}: has no {layout.CONFIG}; `dfmcl promote` writes it")
    config_path, directory = model / layout.CONFIG, model / str(version)
    layout.require_plain(layout.parse_config(config_path.read_text(encoding="utf-8"), config_path), config_path)
    # A library beside the model would replace the backend itself: docs of triton-inference-server/backend. Triton reads
    # neither the card nor the surrogates, as it takes only numbered directories for versions.
    strangers = [path for path in model.iterdir() if not _belongs_to_model(path)]
    strangers += [path for path in directory.glob("*") if path.name not in layout.VERSION_FILES]
    if strangers:
        raise Refused(f"{min(strangers)}: promotion did not write this; remove it")
    if absent := [file for file in sorted(layout.VERSION_FILES) if not (directory / file).is_file()]:
        raise Refused(f"{directory / absent[0]}: promotion writes this, and it is missing; promote again")
    if trust is None:
        inspect(directory, directory)
    else:
        verify(directory, directory, trust, now)
    return Promoted(name, version, directory, read_manifest(directory).model_sha256)


def _belongs_to_model(path: Path) -> bool:
    if path.name in (layout.CONFIG, layout.CARD):
        return path.is_file()
    return path.is_dir() and (path.name.isdecimal() or path.name == layout.SURROGATES or path.name.startswith(STAGING))


def _commit(repository: Path, name: str, manifest: Manifest, stage: Callable[[Path], None]) -> Promoted:
    model = repository / name
    served = layout.served_version(model)
    if served is None and model.exists():
        raise BadInput(f"{model}: exists without {layout.CONFIG}, so promotion did not write it; remove it")
    if served is not None:
        _require_same_interface(manifest, read_manifest(model / str(served)), name)
    aliases = _read_aliases(repository)
    version = 1 + max([0, *layout.version_numbers(model), *_versions_named(aliases.get(name, {}))])
    # A first version is staged where it appears. Later ones inside the model's directory, as Triton without explicit
    # model control takes every directory of the repository for a model.
    staged = Path(tempfile.mkdtemp(prefix=STAGING, dir=repository if served is None else model))
    try:
        directory = staged / str(version)
        stage(directory)
        config = layout.config_pbtxt(manifest, name, version)
        layout.parse_config(config, model / layout.CONFIG)
        _write(staged / layout.CONFIG, config)
        aliases[name] = {"champion": version, "previous": served}
        _write(repository / f"{STAGING}{layout.ALIASES}", json.dumps(aliases, indent=2, sort_keys=True) + "\n")
        staged.chmod(0o755)  # mkdtemp makes 0700; Triton may run as another user
        _sync(staged)
        if served is not None:
            directory.rename(model / str(version))
            _sync(model)
        (repository / f"{STAGING}{layout.ALIASES}").replace(repository / layout.ALIASES)
        # The commit. The first version becomes visible with its model directory, a later one with its config.
        if served is None:
            staged.rename(model)
        else:
            (staged / layout.CONFIG).replace(model / layout.CONFIG)
            _sync(model)
        _sync(repository)
    finally:
        shutil.rmtree(staged, ignore_errors=True)
    return Promoted(name, version, model / str(version), manifest.model_sha256)


def _require_same_interface(new: Manifest, old: Manifest, name: str) -> None:
    if new.interface != old.interface:
        raise Refused(
            f"model {name!r} takes {old.input_shape} and has {len(old.labels)} labels; this candidate takes "
            f"{new.input_shape} and has {len(new.labels)}, or other names: promote it under another name"
        )


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
    _sync(directory)
    verify_files(directory)
    verify(directory, directory, trust, now)


@contextmanager
def _only_writer(repository: Path) -> Iterator[None]:
    """Hold the repository's lock, and clear what promotions that died left in staging."""
    repository.mkdir(parents=True, exist_ok=True)
    with (repository / LOCK).open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for stale in [*repository.glob(f"{STAGING}*"), *repository.glob(f"*/{STAGING}*")]:
            if stale.is_dir():
                shutil.rmtree(stale)
            else:
                stale.unlink()
        yield


def _read_aliases(repository: Path) -> dict[str, Any]:
    path = repository / layout.ALIASES
    if not path.exists():
        return {}
    try:
        aliases = json.loads(path.read_text(encoding="utf-8"))
        if not all(isinstance(entry, dict) for entry in aliases.values()):
            raise ValueError("expected an object for each model")
    except (ValueError, AttributeError) as error:
        raise BadInput(f"{path}: not readable: {error}; remove it, promotion writes it again") from None
    return dict(aliases)


def _versions_named(entry: dict[str, Any]) -> list[int]:
    """Versions that aliases.json remembers, so that a number is not used again although its directory was removed."""
    return [version for version in entry.values() if isinstance(version, int)]


def _write(path: Path, text: str) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _sync(directory: Path) -> None:
    """Make renames in a directory survive a power cut."""
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
