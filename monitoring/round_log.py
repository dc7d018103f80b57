"""Finished rounds on disk, one JSON line each: evidence that outlives the process, and the start of the next one.

Whatever the disk does, probing goes on: what could not be written is counted.
"""

from __future__ import annotations

import json
import os
from collections import deque
from collections.abc import Iterator
from pathlib import Path

from dfmcl.common.errors import BadInput
from dfmcl.common.reader import Unfit, opened, parse_object
from dfmcl.monitoring.results import Round, round_from_json

# Rounds, whatever became of them: enough for the longest windows of both ways, so that bounds go on as they were.
# Reading takes a millisecond each, and nobody is served meanwhile.
READ_AGAIN = 20_000


class RoundLog:
    """Appends to `path`; what would grow beyond `max_bytes` becomes PATH.1 first, in place of the one before.

    plan: a digest of what figures depend on; rounds of another plan are not continued.
    """

    def __init__(self, path: Path, max_bytes: int, plan: str) -> None:
        self._path, self._old, self._max_bytes, self._plan = path, path.with_name(f"{path.name}.1"), max_bytes, plan
        self.failures = 0

    def append(self, outcome: Round) -> None:
        """Write a round down, whole or not at all, as far as the disk allows."""
        entry = {"plan": self._plan, "round": outcome.to_json()}
        line = (json.dumps(entry, separators=(",", ":")) + "\n").encode()
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            if self._path.exists() and self._path.stat().st_size + len(line) > self._max_bytes:
                self._path.replace(self._old)
            with self._path.open("a+b", buffering=0) as file:
                begin = file.seek(0, os.SEEK_END)
                if begin and os.pread(file.fileno(), 1, begin - 1) != b"\n":
                    line = b"\n" + line  # a process that was killed left half a line, which ends here
                try:
                    written = file.write(line)
                    if written != len(line):
                        raise OSError(f"{written} of {len(line)} bytes fit")
                except OSError:
                    os.ftruncate(file.fileno(), begin)  # half a line would swallow the next one
                    raise
        except OSError:
            self.failures += 1

    def rounds(self) -> Iterator[tuple[bool, Round]]:
        """The newest of what was written before, oldest first, and whether it is of this plan; other lines are left
        out."""
        newest: deque[bytes] = deque(maxlen=READ_AGAIN)
        for path in (self._old, self._path):
            try:
                with opened(path, named=True) as file:
                    newest.extend(file)
            except FileNotFoundError:
                continue
            except (OSError, Unfit):
                self.failures += 1
        for line in newest:
            try:
                entry = parse_object(line)
                yield entry["plan"] == self._plan, round_from_json(entry["round"])
            except (ValueError, KeyError, TypeError, ArithmeticError, BadInput):
                continue
