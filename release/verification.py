"""A repository holds the files that promotion wrote and a key signed; who promoted them, nobody asks here."""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from dfmcl.common.errors import BadInput, Refused
from dfmcl.common.reader import leaves
from dfmcl.gating.signing.attestation import Trust, verify
from dfmcl.gating.signing.evidence import inspect
from dfmcl.release import layout, ledger
from dfmcl.release.candidate import MANIFEST, Manifest, read_manifest, verify_files


@dataclass(frozen=True)
class Promoted:
    """A version in the repository. path: its directory; sha256: of its model.onnx."""

    model: str
    version: int
    path: Path
    sha256: str


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
    require_no_strangers(model)
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


def require_no_strangers(model: Path) -> None:
    if found := layout.strangers(model):
        more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
        raise Refused(f"{found[0]}: promotion did not write this{more}; remove it")


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


def require_served(repository: Path, name: str) -> int:
    require_model(repository, name)
    version = layout.served_version(repository / name)
    if version is None:
        raise BadInput(f"{repository / name}: has no {layout.CONFIG}; {layout.MEND}")
    return version


def require_model(repository: Path, name: str) -> None:
    if not is_ours(repository, layout.checked_name(name)):
        known = ", ".join(layout.model_names(repository)) or "none"
        raise BadInput(f"{repository / name}: is not served; models there: {known}")
