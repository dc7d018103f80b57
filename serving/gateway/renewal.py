"""Files that are read again when they change, while their readers go on."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dfmcl.common.errors import BadInput

TICK_SECONDS = 0.4  # a change is acted upon after two: it has to stand still for one, as files are not written at once

State = tuple[tuple[int, int, int] | None, ...]


@dataclass
class WatchedFiles:
    """Files that belong together, and what is done when they have changed.

    act: True where it made a difference; BadInput where the files cannot be used, and all stays as it was.
    """

    name: str
    files: Sequence[str | Path]
    act: Callable[[], bool]
    acted: State = field(init=False)
    last: State = field(init=False)

    def __post_init__(self) -> None:
        self.acted = self.last = self.state()

    def state(self) -> State:
        """Inode, size and time of change of each; None for one that is not there."""
        return tuple(_stamp(Path(name)) for name in self.files)

    def changed(self) -> bool:
        """Whether they are others than at the last change, and have stood still since they were looked at."""
        now, before = self.state(), self.last
        self.last = now
        if now != before or now == self.acted:
            return False
        self.acted = now
        return True


async def renew(sources: Sequence[WatchedFiles], log: Callable[[dict[str, Any]], None]) -> None:
    """Look at all sources every TICK_SECONDS, until cancelled."""
    while True:
        for source in sources:
            if not await asyncio.to_thread(source.changed):  # a mount may hang
                continue
            try:
                if source.act():
                    log({"event": "renewed", "what": source.name})
            except BadInput as error:
                log({"event": "not renewed", "what": source.name, "why": f"{error}; what was read before still holds"})
        await asyncio.sleep(TICK_SECONDS)


def _stamp(path: Path) -> tuple[int, int, int] | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_ino, found.st_size, found.st_mtime_ns
