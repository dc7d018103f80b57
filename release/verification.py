"""A repository holds the files that promotion wrote and a key signed; who promoted them, nobody asks here."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from dfmcl.common.errors import BadInput, Refused
from dfmcl.gating.signing.attestation import Trust, verify
from dfmcl.gating.signing.evidence import inspect
from dfmcl.release import layout, ledger
from dfmcl.release.candidate import MANIFEST, Manifest, verify_files
from dfmcl.release.stores.directory import entry_of
from dfmcl.release.stores.store import Store, local_folder, told


@dataclass(frozen=True)
class Promoted:
    """A version in a repository. sha256: of its model.onnx."""

    model: str
    version: int
    store: Store
    sha256: str

    @property
    def folder(self) -> str:
        """Its name in the store."""
        return f"{self.model}/{self.version}"

    @property
    def path(self) -> Path:
        """Its folder on this machine."""
        return self.store.local(self.folder)


def verify_release(store: Store, name: str, trust: Trust | None = None, now: datetime | None = None) -> Promoted:
    """What Triton would serve as `name`; Refused, NotAttested or BadEvidence where promotion did not write it.

    trust: whose signatures must vouch for it at `now` (default: now). Without it layout, digests and verdict are judged
    as they lie there: that finds what broke or was swapped by mistake, not who wrote the report.
    """
    where, model = store.where(name), layout.entry_at(store, name)
    if not model.folder:
        raise BadInput(f"{where}: no such model; there are {', '.join(layout.model_names(store)) or 'none'}")
    if model.leaves:
        raise Refused(f"{where}: is a link out of the repository; promotion did not write this")
    version = layout.served_version(store, name)
    if version is None:
        raise Refused(f"{where}: has no {layout.CONFIG}; {layout.MEND}")
    require_no_strangers(store, name)
    whole: dict[int, Manifest] = {}
    for config in layout.CONFIGS:
        # The GPU's may be missing, or still be an older version's, where a promotion was cut short.
        if (number := layout.served_version(store, name, config)) is not None:
            whole[number] = whole.get(number) or verify_version_of(store, f"{name}/{number}", trust, now)
            layout.require_ours(store, name, config, whole[number], number)
    return Promoted(name, version, store, whole[version].model_sha256)


def verify_version_of(store: Store, folder: str, trust: Trust | None = None, now: datetime | None = None) -> Manifest:
    """As `verify_version`, of a folder in a store."""
    with local_folder(store, folder) as local:
        return verify_version(local, trust, now)


def verify_version(directory: Path, trust: Trust | None = None, now: datetime | None = None) -> Manifest:
    """The manifest of a version that is whole and vouched for; as for a release, which has a config besides."""
    if not layout.is_version(entry_of(directory)):
        raise Refused(f"{directory}: is no version's directory, or is gone; {layout.MEND}")
    if extra := sorted({path.name for path in directory.iterdir()} - layout.VERSION_FILES - {layout.SIGNATURE}):
        raise Refused(f"{directory / extra[0]}: promotion did not write this; remove it")
    if absent := [file for file in sorted(layout.VERSION_FILES) if not (directory / file).is_file()]:
        raise Refused(f"{directory / absent[0]}: promotion writes this, and it is missing; {layout.MEND}")
    if trust is None:
        inspect(directory, directory)
    else:
        verify(directory, directory, trust, now)
    return verify_files(directory)


def verify_at(store: Store, name: str, trust: Trust, now: datetime | None = None) -> str:
    """The name of a version, verified. name: a model's in a repository, one of its versions', or that of a copy."""
    if layout.entry_at(store, f"{name}/{layout.CONFIG}").file:
        return verify_release(store, name, trust, now).folder
    model, slash, last = name.rpartition("/")
    in_model = layout.entry_at(store, name).link or layout.lies_there(store, f"{model}{slash}{layout.CONFIG}")
    if in_model and layout.VERSION.fullmatch(last):
        verify_version_of(store, name, trust, now)
    return name


def require_no_strangers(store: Store, name: str) -> None:
    if found := layout.strangers(store, name):
        more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
        raise Refused(f"{store.where(found[0])}: promotion did not write this{more}; remove it")


def require_repository(store: Store) -> None:
    """BadInput where there is no such directory: a typing error must not look like an empty repository."""
    try:
        store.entries()
    except (FileNotFoundError, NotADirectoryError):
        raise BadInput(
            f"{store.where()}: no such {'repository' if store.whole else 'directory'};"
            " name a model repository that `dfmcl promote` wrote"
        ) from None
    except OSError as error:
        raise told(error, f"{store.where()}: cannot be read: {error.strerror or error}") from None


def is_ours(store: Store, name: str) -> bool:
    """Whether promotion made a model's directory, whatever has been damaged in it since."""
    model = layout.entry_at(store, name)
    if not model.folder or model.leaves:
        return False
    versions = layout.version_numbers(store, name)
    if any(layout.lies_there(store, f"{name}/{version}/{MANIFEST}") for version in versions):
        return True
    return ledger.last_served(ledger.events_of(store, name)) is not None


def served_or_none(store: Store, name: str) -> int | None:
    """The version that a model's config.pbtxt names; None where it names none, for whatever reason."""
    try:
        return layout.served_version(store, name)
    except BadInput:
        return None


def require_served(store: Store, name: str) -> int:
    require_model(store, name)
    version = layout.served_version(store, name)
    if version is None:
        raise BadInput(f"{store.where(name)}: has no {layout.CONFIG}; {layout.MEND}")
    return version


def require_model(store: Store, name: str) -> None:
    if not is_ours(store, layout.checked_name(name)):
        known = ", ".join(layout.model_names(store)) or "none"
        raise BadInput(f"{store.where(name)}: is not served; models there: {known}")
