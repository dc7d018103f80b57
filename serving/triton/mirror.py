"""What a repository serves now, copied to where a Triton reads it; copies are judged, as their source may change."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from dfmcl.common.errors import BadInput, Broken, DfmclError, Refused, unwritable
from dfmcl.common.reader import TEXT_BYTES
from dfmcl.gating.signing.attestation import BadEvidence, NotAttested, Trust
from dfmcl.release import layout, ledger
from dfmcl.release.stores.directory import Directory
from dfmcl.release.stores.store import Etag, Store, UnusableStore, told
from dfmcl.release.verification import Promoted, is_ours, require_no_strangers, verify_release, verify_version
from dfmcl.serving.triton.sight import Mark, look

Tell = Callable[[str], None]


def adopt(store: Store, name: str, trust: Trust | None, into: Directory) -> Promoted:
    """A private copy in `into` of what the repository says of a model; verified there and at its source."""
    store, target = store.now(), into.root / name
    release = verify_release(store, name, trust)
    source, copy = release.path, target / str(release.version)
    copy.mkdir(parents=True, exist_ok=True)
    (target / layout.CONFIG).write_bytes(layout.config_bytes(store, name))
    for file in layout.files_in(source):
        shutil.copy(source / file, copy / file)
    return verify_release(into, name, trust)


@dataclass
class Mirror:
    """A directory that a Triton polls, which follows a store: each model's version comes first, its config last.

    into: where nobody else writes. seen: each model as it was last copied, or refused, and why it was.
    """

    store: Store
    into: Directory
    tell: Tell
    seen: dict[str, tuple[Mark, Trust | None, DfmclError | None]] = field(default_factory=dict)

    def follow(self, ask_trust: Callable[[], Trust] | None, every: float, stop: threading.Event) -> None:
        """Copy what changes until `stop`, and say what cannot be copied, once.

        BadInput or Broken where the store cannot be read and nothing was ever copied: else what lies here is served on,
        also by a sidecar that begins anew while the store is away.
        """
        said: dict[str, str] | None = None
        while True:
            try:
                troubles = {name: str(error) for name, error in self.once(ask_trust and ask_trust()).items()}
            except (BadInput, Broken) as error:
                if said is None and not self._held():
                    raise
                troubles = {"": str(error)}
            said = said or {}
            for name in [name for name in troubles if troubles[name] != said.get(name)]:
                self.tell(f"{troubles[name]}; what lies in {self.into.root} stays")
            for name in said.keys() - troubles.keys():
                self.tell(f"{self.store.where(name)}: can be read again")
            said = troubles
            if stop.wait(every):
                return

    def once(self, trust: Trust | None) -> Mapping[str, DfmclError]:
        """Bring the directory to what the store says now; why a model was left as it was, by name.

        BadInput where the store cannot be read, holds no model, or the directory cannot be written; Broken where the
        store is silent, or the disk full.
        """
        try:
            store = self.store.now()
        except OSError as error:
            raise told(error, f"{self.store.where()}: cannot be read: {error.strerror}") from None
        sight = look(store)
        if "" in sight.troubles:
            raise sight.troubles[""]
        if not (sight.marks or sight.troubles or self._held()):
            raise BadInput(f"{store.where()}: holds no promoted model; `dfmcl promote` adds one")
        troubles = dict(sight.troubles)
        for name, (mark, trusted, refusal) in self.seen.items():
            if refusal is not None and (mark, trusted) == (sight.marks.get(name), trust):
                troubles[name] = refusal
        changed = [name for name, mark in sight.marks.items() if self.seen.get(name, ())[:2] != (mark, trust)]
        gone = [name for name in self._held() if name not in sight.marks and name not in sight.troubles]
        if changed or gone:
            try:
                with self.into.writing():
                    for name in changed:
                        if (why := self._taken(store, name, sight.marks[name], trust)) is not None:
                            troubles[name] = why
                    for name in gone:
                        troubles |= self._drop(store, name)
            except UnusableStore as error:
                raise told(error, str(error)) from None
            except OSError as error:
                raise unwritable(error.filename or self.into.root, error) from None
        return troubles

    def _taken(self, store: Store, name: str, mark: Mark, trust: Trust | None) -> DfmclError | None:
        """Copy a model; why it was left as it was."""
        judged = False
        try:
            release = verify_release(store, name, trust)
            judged = True
            self._take(store, release, trust)
        except DfmclError as error:
            if not judged and isinstance(error, Refused | NotAttested | BadEvidence):
                self.seen[name] = mark, trust, error  # it stays so as long as nothing changes
            return error
        except UnusableStore as error:
            return told(error, str(error))
        self.seen[name] = mark, trust, None
        return None

    def _held(self) -> list[str]:
        return [name for name in layout.folders(self.into) if is_ours(self.into, name)]

    def _take(self, store: Store, release: Promoted, trust: Trust | None) -> None:
        """Version first, as Triton may look at any moment; then the configs, the CPU's last; then old versions go."""
        name = release.model
        texts = {path: store.read(f"{name}/{path}", TEXT_BYTES) for path in reversed(layout.CONFIGS)}
        before = layout.served_version(self.into, name)
        if layout.taken(self.into, name):
            if not is_ours(self.into, name):
                raise BadInput(f"{self.into.where(name)}: this command did not write it; move it away")
            require_no_strangers(self.into, name)
            self._take_version(release, trust)
            for path, text in texts.items():
                self._replace(f"{name}/{path}", text)
        else:
            with self.into.added(name) as folder:
                shutil.copytree(release.path, folder / str(release.version))
                for path, text in texts.items():
                    (folder / path).parent.mkdir(exist_ok=True)
                    (folder / path).write_bytes(text)
                verify_version(folder / str(release.version), trust)
        for old in layout.version_numbers(self.into, name):
            if old not in (before, release.version):
                with self.into.removed(f"{name}/{old}"):
                    pass
        if before != release.version:
            self.tell(f"{self.into.where(name)}: version {release.version} (sha256 {release.sha256[:12]})")

    def _take_version(self, release: Promoted, trust: Trust | None) -> None:
        if layout.taken(self.into, release.folder):
            try:
                verify_version(self.into.root / release.folder, trust)
                return
            except DfmclError:  # damaged here
                with self.into.removed(release.folder):
                    pass
        with self.into.added(release.folder) as folder:
            for file in layout.files_in(release.path):
                shutil.copy(release.path / file, folder / file)
            verify_version(folder, trust)

    def _replace(self, name: str, data: bytes) -> None:
        seen: Etag | None = self.into.etag(name) if layout.lies_there(self.into, name) else None
        if seen is None or self.into.read(name, TEXT_BYTES) != data:
            self.into.replace(name, data, seen)

    def _drop(self, store: Store, name: str) -> dict[str, DfmclError]:
        """Remove a model that was retired: only the history says so, as absence may be a mistake."""
        if not ledger.is_retired(store, name):
            where = store.where(name)
            return {name: BadInput(f"{where}: is gone, and the history does not say that it was retired")}
        with self.into.removed(name):
            self.seen.pop(name, None)
        self.tell(f"{self.into.where(name)}: was retired, and is removed")
        return {}


def mirror(store: Store, into: Path, tell: Tell) -> Mirror:
    """Into a directory that may be missing yet; BadInput where it cannot be made."""
    try:
        into.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise unwritable(into, error) from None
    return Mirror(store, Directory(into), tell)
