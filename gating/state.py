"""What an interrupted gate has done so far: blocks on disk, bound to everything that they depend on."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from robustness.errors import BadInput, Broken
from robustness.files import dump_json, read_json, write_text
from robustness.ranks import Ranks

FORMAT = "dfmcl.gate-state/1"
IDENTITY = "state.json"


@dataclass(frozen=True)
class State:
    """A directory beside the evidence. It is there from the first block to the evidence, and after an interruption."""

    directory: Path

    @staticmethod
    @contextmanager
    def at(out: Path, identity: Mapping[str, str], ranks: Ranks) -> Iterator[State]:
        """The state of the gate that writes to `out`; BadInput where there is one of another gate.

        An empty one is removed when the gate ends before its first block, by an error or not.
        """
        state = State(out.with_name(f"{out.name}.partial"))
        try:
            if ranks.first:
                state._claim(identity)
            ranks.gather(None)  # nobody writes before the first has looked
            yield state
        finally:
            if ranks.first and state.directory.is_dir() and not any(state.directory.glob("*.npz")):
                state.done()

    def path(self, purpose: str, number: int) -> Path:
        """Where block `number` lies, once it is done."""
        return self.directory / f"{purpose}-{number:05d}.npz"

    def done(self) -> None:
        """The evidence is written: what led to it can go."""
        shutil.rmtree(self.directory, ignore_errors=True)

    def _claim(self, identity: Mapping[str, str]) -> None:
        path = self.directory / IDENTITY
        if path.is_file():
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
        if self.directory.exists():
            raise BadInput(f"{self.directory}: is no state of a gate; remove it, or name another --out")
        try:
            self.directory.mkdir(parents=True)
        except OSError as error:
            raise Broken(f"{self.directory}: cannot be made: {error.strerror or error}") from None
        write_text(path, dump_json({"format": FORMAT, "identity": dict(identity)}))
