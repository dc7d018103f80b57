"""What probing may cost: so many images in a window of time, and none for a while after a server had no room."""

from __future__ import annotations

from dataclasses import dataclass, replace

# What says that there is no room: users are waiting too. A refused connection costs nobody anything, and its end should
# be seen soon.
NO_ROOM = ("queue_full", "timeout", "slow")
LONGEST = 15  # rounds left out in a row


@dataclass(frozen=True)
class Budget:
    """Images in windows of so many seconds. began: the monotonic second at which this one did; used: in it so far."""

    images: int
    window_seconds: float
    began: float = 0.0
    used: int = 0

    def at(self, now: float) -> Budget:
        """The budget in the window of a later moment."""
        windows = (now - self.began) // self.window_seconds
        return replace(self, began=self.began + windows * self.window_seconds, used=0) if windows >= 1 else self

    def has(self, images: int) -> bool:
        """Whether so many more are allowed in this window."""
        return self.used + images <= self.images

    def spent(self, images: int) -> Budget:
        """After asking about so many."""
        return replace(self, used=self.used + images)


@dataclass(frozen=True)
class BackOff:
    """Rounds left out: 1 after a round without room, then 3, 7, 15, 15, ... until one is answered."""

    failures: int = 0
    left_out: int = 0

    @property
    def waits(self) -> bool:
        """Whether the next round is to be left out."""
        return self.left_out > 0

    def skipped(self) -> BackOff:
        """After leaving one out."""
        return replace(self, left_out=self.left_out - 1)

    def after(self, reason: str) -> BackOff:
        """After a round that ended for this reason, "" where it was measured."""
        if reason not in NO_ROOM:
            return BackOff()
        failures = self.failures + 1
        return BackOff(failures, min(2**failures - 1, LONGEST))
