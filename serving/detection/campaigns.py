"""When near-duplicates of one key make a campaign: many of them among its last images. Times come from the caller."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Rule:
    """A campaign begins with `matches` of them among the last `queries` images and within `seconds`.

    It ends when for quiet_seconds there was none.
    """

    matches: int
    queries: int
    seconds: float
    quiet_seconds: float


@dataclass(frozen=True)
class QueryCampaign:
    """Of one key, seen by one detector. begun, last: when its first and its latest match came; matches: so far."""

    key: str
    detector: str
    begun: float
    last: float
    matches: int


class Alarm:
    """Follows one key's matches by one detector. campaign: the one that goes on, or None."""

    def __init__(self, key: str, detector: str, rule: Rule) -> None:
        self.campaign: QueryCampaign | None = None
        self.detector = detector
        self._key, self._rule = key, rule
        self._recent: deque[tuple[int, float]] = deque(maxlen=rule.matches)

    def match(self, number: int, now: float) -> bool:
        """Count a match of the key's image of this number; whether a campaign begins with it."""
        if self.campaign is not None:
            self.campaign = replace(self.campaign, last=now, matches=self.campaign.matches + 1)
            return False
        self._recent.append((number, now))
        first, begun = self._recent[0]
        rule = self._rule
        if len(self._recent) < rule.matches or number - first >= rule.queries or now - begun > rule.seconds:
            return False
        self.campaign = QueryCampaign(self._key, self.detector, begun, now, rule.matches)
        self._recent.clear()
        return True

    def end(self, now: float = float("inf")) -> QueryCampaign | None:
        """The campaign that ended by now, quiet for long enough, or None; without a time it ends at once."""
        ended = self.campaign
        if ended is None or now - ended.last < self._rule.quiet_seconds:
            return None
        self.campaign = None
        return ended
