"""Until when work may go on: a signal or the clock ends it at its next boundary, with everything saved."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from threading import Event

from dfmcl.common.errors import Interrupted


class EndedAtOnce(Interrupted):
    """A second signal came before the work had stopped; what was saved before is whole."""


@dataclass(frozen=True)
class Limits:
    """Work ends once `stop` is set, or `clock` (in seconds) has reached `deadline`."""

    stop: Event = field(default_factory=Event)
    deadline: float = math.inf
    clock: Callable[[], float] = time.monotonic

    @staticmethod
    def of(stop: Event, minutes: float | None) -> Limits:
        """From a signal's event, and so many minutes from now (None: no end)."""
        return Limits(stop, math.inf if minutes is None else time.monotonic() + 60 * minutes)

    @property
    def over(self) -> bool:
        return self.stop.is_set() or self.clock() >= self.deadline

    def check(self) -> None:
        """Raise Interrupted once it is over."""
        if self.over:
            raise Interrupted("stopped")
