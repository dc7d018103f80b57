"""What a watch has seen so far: totals since its start, the last rounds, and failures longer than successes.

A journal never changes; the next one replaces it. Readers in other threads therefore never see half a round.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from dfmcl.monitoring.bounds import Bounds
from dfmcl.monitoring.results import (
    PATHS,
    REASONS,
    SKIPS,
    TRITON,
    Example,
    Query,
    Replayed,
    Round,
    RoundFailure,
    RoundResult,
    RoundSkipped,
)
from dfmcl.robustness.statistics import Share

RECENT = 20  # rounds of any outcome; live shares are over the measured ones among them
KEPT_FAILURES = 50  # failures outlive successes, because one looks for them after the fact
KEPT_EXAMPLES = 12
POINTS = 720  # of the page's curve: half a day of a round a minute
OUTAGES = ("unavailable", "server_error", "timeout")
# Two versions exist side by side only while one replaces the other; the series of older ones vanish.
VERSIONS = 2
# A request of 4 small images takes milliseconds on a CPU; 10 s is twice the default deadline.
QUERY_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
# Resting between requests dominates: seconds for a round of transfer, minutes for a search by queries.
ROUND_SECONDS = (0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)


@dataclass(frozen=True)
class Histogram:
    """Counts of values up to each bound (the last count: above all bounds), not accumulated, and their sum."""

    bounds: tuple[float, ...]
    counts: tuple[int, ...]
    sum: float = 0.0

    @staticmethod
    def empty(bounds: tuple[float, ...]) -> Histogram:
        return Histogram(bounds, (0,) * (len(bounds) + 1))

    def observe(self, value: float) -> Histogram:
        """The histogram with one more value."""
        place = bisect_left(self.bounds, value)
        counts = tuple(count + (i == place) for i, count in enumerate(self.counts))
        return replace(self, counts=counts, sum=self.sum + value)


@dataclass(frozen=True)
class AttackTotals:
    """samples: images the attack is judged on; attempts: right before it; successes: flipped; correct: still right.

    queries: images asked about, in all.
    """

    samples: int = 0
    correct: int = 0
    attempts: int = 0
    successes: int = 0
    queries: int = 0


@dataclass(frozen=True)
class VersionTotals:
    """Of one served version. bounds: by `clean`, `worst_case` or attack; recent: its last measured rounds.

    integrity: whether every replayed answer of the last round that replayed any was the gate's; None before it.
    difference: the largest of them, in units of what is tolerated. further: of its further threats, by kind.
    """

    version: str
    samples: int = 0
    correct: int = 0
    attacks: Mapping[str, AttackTotals] = field(default_factory=dict)
    replayed: int = 0
    mismatches: int = 0
    integrity: bool | None = None
    difference: float = 0.0
    further: Mapping[str, Replayed] = field(default_factory=dict)
    bounds: Mapping[str, Bounds] = field(default_factory=dict)
    recent: tuple[RoundResult, ...] = ()

    def after(self, result: RoundResult, limit: float) -> VersionTotals:
        """With the counts of one more round. limit: of a new bound, see bounds.limit."""
        attacks, bounds = dict(self.attacks), dict(self.bounds)

        def count(name: str, share: Share) -> None:
            bounds[name] = bounds.get(name, Bounds(limit)).after(share.k, share.n, result.started)

        for attack in result.asked:
            old, held = attacks.get(attack.name, AttackTotals()), sum(attack.held)
            attacks[attack.name] = AttackTotals(
                samples=old.samples + len(result.correct),
                correct=old.correct + held,
                attempts=old.attempts + sum(result.correct),
                successes=old.successes + sum(result.correct) - held,
                queries=old.queries + attack.queries,
            )
            count(attack.name, result.under(attack))
        totals = replace(self, attacks=attacks, bounds=bounds, recent=(*self.recent, result)[-RECENT:])
        if result.via != TRITON:
            return totals
        count("clean", result.clean)
        count("worst_case", result.worst_case)
        totals = replace(totals, samples=self.samples + len(result.correct), correct=self.correct + sum(result.correct))
        if result.replay is None:
            return totals
        further = dict(self.further)
        for part in result.replay.further:
            before = further.get(part.kind, Replayed(part.kind, 0, 0))
            images, mismatches = before.images + part.images, before.mismatches + part.mismatches
            further[part.kind] = Replayed(part.kind, images, mismatches)
        return replace(
            totals,
            further=further,
            replayed=self.replayed + result.replay.images,
            mismatches=self.mismatches + result.replay.mismatches,
            integrity=result.replay.mismatches == 0,
            difference=result.replay.difference,
        )

    def lately(self, name: str) -> Share:
        """Of the recent rounds together: `clean`, `worst_case` or an attack; 0 of 0 where there was none."""
        rounds = self.recent if name in self.attacks else [one for one in self.recent if one.via == TRITON]
        shares = [share for one in rounds if (share := _share(one, name)) is not None]
        return Share(sum(share.k for share in shares), sum(share.n for share in shares))

    def success(self, name: str) -> float | None:
        """Share of recent images that were right and that an attack flipped; None where none was attacked."""
        rounds = [(one, attack) for one in self.recent for attack in one.asked if attack.name == name]
        attempts = sum(sum(one.correct) for one, _ in rounds)
        return 1 - sum(sum(attack.held) for _, attack in rounds) / attempts if attempts else None


def _share(result: RoundResult, name: str) -> Share | None:
    if name == "clean":
        return result.clean
    if name == "worst_case":
        return result.worst_case
    return next((result.under(attack) for attack in result.asked if attack.name == name), None)


@dataclass(frozen=True)
class PathTotals:
    """Of one way to the model. up: whether it answered the last round (None: none yet). Times are unix seconds."""

    rounds: int = 0
    failures: Mapping[str, int] = field(default_factory=lambda: dict.fromkeys(REASONS, 0))
    skips: Mapping[str, int] = field(default_factory=lambda: dict.fromkeys(SKIPS, 0))
    queries: int = 0
    query_failures: Mapping[str, int] = field(default_factory=lambda: dict.fromkeys(REASONS, 0))
    images: int = 0
    query_seconds: Histogram = field(default_factory=lambda: Histogram.empty(QUERY_SECONDS))
    round_seconds: Histogram = field(default_factory=lambda: Histogram.empty(ROUND_SECONDS))
    up: bool | None = None
    last_attempt: float = 0.0
    last_success: float = 0.0
    last_seconds: float = 0.0

    def after(self, outcome: Round) -> PathTotals:
        """With one more round, begun or left out."""
        totals = self._with_queries(outcome.queries)
        if isinstance(outcome, RoundSkipped):
            return replace(totals, skips=_increased(self.skips, outcome.reason))
        totals = replace(
            totals,
            rounds=self.rounds + 1,
            last_attempt=outcome.started,
            last_seconds=outcome.seconds,
            round_seconds=self.round_seconds.observe(outcome.seconds),
        )
        if isinstance(outcome, RoundResult):
            return replace(totals, up=True, last_success=outcome.started + outcome.seconds)
        # Nonsense and refusals are answers, and our own bugs say nothing about the server.
        up = self.up if outcome.reason == "internal" else outcome.reason not in OUTAGES
        return replace(totals, up=up, failures=_increased(self.failures, outcome.reason))

    def _with_queries(self, queries: tuple[Query, ...]) -> PathTotals:
        seconds, failures = self.query_seconds, self.query_failures
        for query in queries:
            seconds = seconds.observe(query.seconds)
            failures = _increased(failures, query.reason) if query.reason else failures
        return replace(
            self,
            queries=self.queries + len(queries),
            images=self.images + sum(query.images for query in queries),
            query_seconds=seconds,
            query_failures=failures,
        )


@dataclass(frozen=True)
class Point:
    """Of the page's curve: live worst case after a round, and the bounds of its mean then. time: unix seconds."""

    time: float
    version: str
    value: float
    lower: float
    upper: float


@dataclass(frozen=True)
class Journal:
    """limit: of bounds, see bounds.limit. last: the newest result through Triton."""

    limit: float
    paths: Mapping[str, PathTotals] = field(default_factory=lambda: dict.fromkeys(PATHS, PathTotals()))
    versions: tuple[VersionTotals, ...] = ()
    recent: tuple[Round, ...] = ()
    kept_failures: tuple[RoundFailure, ...] = ()
    examples: tuple[Example, ...] = ()
    points: tuple[Point, ...] = ()

    def after(self, outcome: Round) -> Journal:
        """With one more round."""
        journal = replace(
            self,
            paths={**self.paths, outcome.via: self.paths[outcome.via].after(outcome)},
            recent=(*self.recent, outcome)[-RECENT:],
        )
        if isinstance(outcome, RoundSkipped):
            return journal
        if isinstance(outcome, RoundFailure):
            return replace(journal, kept_failures=(*self.kept_failures, outcome)[-KEPT_FAILURES:])
        old = {totals.version: totals for totals in self.versions}
        newest = old.pop(outcome.version, VersionTotals(outcome.version)).after(outcome, self.limit)
        journal = replace(
            journal,
            versions=(*old.values(), newest)[-VERSIONS:],
            examples=(*self.examples, *outcome.examples)[-KEPT_EXAMPLES:],
        )
        if outcome.via != TRITON:
            return journal
        bounds = newest.bounds["worst_case"]
        point = Point(outcome.started, outcome.version, newest.lately("worst_case").value, bounds.lower, bounds.upper)
        return replace(journal, points=(*self.points, point)[-POINTS:])

    @property
    def current(self) -> VersionTotals | None:
        """Of the version that answered last; None before the first result."""
        return self.versions[-1] if self.versions else None

    @property
    def history(self) -> tuple[Round, ...]:
        """The recent rounds and the failures before them, oldest first."""
        recent = {(outcome.via, outcome.number) for outcome in self.recent}
        kept = (one for one in self.kept_failures if (one.via, one.number) not in recent)
        return (*kept, *self.recent)


def _increased(counts: Mapping[str, int], key: str) -> Mapping[str, int]:
    return {**counts, key: counts[key] + 1}
