"""What an interrupted gate has done so far: blocks on disk, bound to everything that they depend on.

They decide a verdict, and lie where a pipeline's caches and checkouts bring in files. So each is sealed with a secret
that a stranger does not have; what was not sealed with it is attacked again.
"""

from __future__ import annotations

import hmac
import os
import secrets
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from dfmcl.common.errors import BadInput, Interrupted
from dfmcl.common.files import clear_parts, dump_json, read_json, write_bytes, write_text
from dfmcl.common.locks import LOCK, held
from dfmcl.gating.signing.signer import Signer, seal_of
from dfmcl.robustness.ranks import Ranks

FORMAT = "dfmcl.gate-state/1"
IDENTITY = "state.json"
SEAL_BYTES = 32
SIGTERM = 143  # the exit code of a process that was asked to end


def secret_of(signers: Sequence[Signer]) -> bytes:
    """What seals the state: of the first signer, else of this user; a new one where that cannot be kept."""
    if signers:
        return seal_of(signers[0])
    home = Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state")
    path = home / "dfmcl" / "seal"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(secrets.token_bytes(SEAL_BYTES))
    except OSError:  # it is there, or cannot be
        pass
    try:
        return path.read_bytes() or secrets.token_bytes(SEAL_BYTES)
    except OSError:
        return secrets.token_bytes(SEAL_BYTES)


@dataclass(frozen=True)
class State:
    """A directory beside the evidence. It is there from the first block to the evidence, and after an interruption.

    seal: the secret of this gate's blocks.
    """

    directory: Path
    seal: bytes

    @staticmethod
    @contextmanager
    def at(out: Path, identity: Mapping[str, str], secret: bytes, ranks: Ranks) -> Iterator[State]:
        """The state of the gate that writes to `out`; BadInput where there is one of another gate, or it is at work.

        An empty one is removed when the gate ends before its first block, by an error or not. Interrupted, which says
        what is kept, for a signal.
        """
        seal = hmac.digest(ranks.gather(secret)[0], dump_json(dict(identity)).encode(), "sha256")
        state = State(out.with_name(f"{out.name}.partial"), seal)
        with ExitStack() as stack:
            ranks.first_does(lambda: stack.enter_context(state._claimed(identity)))
            yield state
            ranks.gather(None)  # the first goes last: the next gate finds nobody at work

    def load(self, purpose: str, number: int) -> bytes | None:
        """Block `number`; None where it is not done, or not by this gate."""
        path = self._path(purpose, number)
        if not path.is_file():
            return None
        found = path.read_bytes()
        data, seal = found[:-SEAL_BYTES], found[-SEAL_BYTES:]
        return data if hmac.compare_digest(seal, self._sealed(path, data)) else None

    def save(self, purpose: str, number: int, data: bytes) -> None:
        """Keep block `number`."""
        path = self._path(purpose, number)
        write_bytes(path, data + self._sealed(path, data))

    def _path(self, purpose: str, number: int) -> Path:
        return self.directory / f"{purpose}-{number:05d}.npz"

    def _sealed(self, path: Path, data: bytes) -> bytes:
        return hmac.digest(self.seal, path.name.encode() + b"\0" + data, "sha256")

    def done(self) -> None:
        """The evidence is written: what led to it can go."""
        for path in (self.directory / IDENTITY, *self._blocks()):
            path.unlink(missing_ok=True)

    def _blocks(self) -> list[Path]:
        return list(self.directory.glob("*.npz"))

    @contextmanager
    def _claimed(self, identity: Mapping[str, str]) -> Iterator[None]:
        """Only this gate writes here inside; a signal's end says what is kept."""
        try:
            with held(self.directory / LOCK, self.directory):
                self._claim(identity)
                try:
                    yield
                except (KeyboardInterrupt, SystemExit) as signalled:
                    raise self._interrupted(signalled) from None
                finally:
                    if not self._blocks():
                        self.done()
        finally:
            with suppress(OSError):  # blocks are left, or another gate has come
                self.directory.rmdir()

    def _interrupted(self, signalled: BaseException) -> BaseException:
        code = signalled.code if isinstance(signalled, SystemExit) else Interrupted.exit_code
        if code not in (Interrupted.exit_code, SIGTERM):
            return signalled  # of a model's own code
        count = len(self._blocks())
        kept = f"{count} blocks of images are done and kept" if count else "no block of images was done yet"
        error = Interrupted(f"{self.directory}: interrupted; {kept}; repeat the command to go on")
        error.exit_code = int(code)
        return error

    def _claim(self, identity: Mapping[str, str]) -> None:
        clear_parts(self.directory)
        path = self.directory / IDENTITY
        if path.is_file() and self._blocks():
            found = read_json(path).get("identity")
            found = found if isinstance(found, dict) else {}
            other = [key for key in {**found, **identity} if found.get(key) != identity.get(key)]
            if other:
                raise BadInput(
                    f"{self.directory}: belongs to a gate with another {other[0]}"
                    f" ({str(found.get(other[0]))[:12]}, not {str(identity.get(other[0]))[:12]}); finish that one as it"
                    " was begun, remove the directory, or name another --out"
                )
            return
        if {found.name for found in self.directory.iterdir()} - {LOCK, IDENTITY}:
            raise BadInput(f"{self.directory}: is no state of a gate; remove it, or name another --out")
        write_text(path, dump_json({"format": FORMAT, "identity": dict(identity)}))
