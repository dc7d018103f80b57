"""What a watch has seen so far: totals since its start, the last rounds, and failures longer than successes.

A journal never changes; the next one replaces it. Readers in other threads therefore never see half a round.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from monitoring.rounds import REASONS, Query, Round, RoundFailure, RoundResult

RECENT = 20  # rounds of any outcome
KEPT_FAILURES = 50  # failures outlive successes, as one looks for them after the fact
# Two versions exist side by side only while one replaces the other; the series of older ones vanish.
VERSIONS = 2
# A request of 32 small images takes milliseconds on a CPU; 10 s is twice the default deadline.
QUERY_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
# Crafting dominates: a second on a small network, minutes on a large one.
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
    """samples: images the attack is judged on; attempts: right before it; successes: flipped; correct: still right."""

    samples: int = 0
    correct: int = 0
    attempts: int = 0
    successes: int = 0


@dataclass(frozen=True)
class VersionTotals:
    """Of one served version."""

    version: str
    samples: int = 0
    correct: int = 0
    attacks: Mapping[str, AttackTotals] = field(default_factory=dict)

    def after(self, result: RoundResult) -> VersionTotals:
        """With the counts of one more round."""
        attacks = dict(self.attacks)
        for attack in result.attacks:
            old, held = attacks.get(attack.name, AttackTotals()), sum(attack.held)
            attacks[attack.name] = AttackTotals(
                samples=old.samples + len(result.correct),
                correct=old.correct + held,
                attempts=old.attempts + sum(result.correct),
                successes=old.successes + sum(result.correct) - held,
            )
        samples, correct = self.samples + len(result.correct), self.correct + sum(result.correct)
        return VersionTotals(self.version, samples, correct, attacks)


@dataclass(frozen=True)
class Journal:
    """up: whether the endpoint answered the last round (None: no round yet). last_attempt, last_success: unix time."""

    rounds: int = 0
    failures: Mapping[str, int] = field(default_factory=lambda: dict.fromkeys(REASONS, 0))
    queries: int = 0
    query_failures: Mapping[str, int] = field(default_factory=lambda: dict.fromkeys(REASONS, 0))
    images: int = 0
    query_seconds: Histogram = field(default_factory=lambda: Histogram.empty(QUERY_SECONDS))
    round_seconds: Histogram = field(default_factory=lambda: Histogram.empty(ROUND_SECONDS))
    versions: tuple[VersionTotals, ...] = ()
    up: bool | None = None
    last_attempt: float = 0.0
    last_success: float = 0.0
    last_result: RoundResult | None = None
    last_seconds: float = 0.0
    recent: tuple[Round, ...] = ()
    kept_failures: tuple[RoundFailure, ...] = ()

    def begun(self, now: float) -> Journal:
        """With a round that starts now."""
        return replace(self, rounds=self.rounds + 1, last_attempt=now)

    def after(self, outcome: Round) -> Journal:
        """With the outcome of the round that had begun."""
        journal = replace(
            self._with_queries(outcome.queries),
            round_seconds=self.round_seconds.observe(outcome.seconds),
            last_seconds=outcome.seconds,
            recent=(*self.recent, outcome)[-RECENT:],
        )
        if isinstance(outcome, RoundFailure):
            return replace(
                journal,
                failures=_increased(self.failures, outcome.reason),
                # Only silence is an outage: nonsense and refusals are answers, and our own bugs say nothing about it.
                up=self.up if outcome.reason == "internal" else outcome.reason not in ("unavailable", "timeout"),
                kept_failures=(*self.kept_failures, outcome)[-KEPT_FAILURES:],
            )
        old = {totals.version: totals for totals in self.versions}
        newest = old.pop(outcome.version, VersionTotals(outcome.version)).after(outcome)
        return replace(
            journal,
            versions=(*old.values(), newest)[-VERSIONS:],
            up=True,
            last_success=outcome.started + outcome.seconds,
            last_result=outcome,
        )

    @property
    def history(self) -> tuple[Round, ...]:
        """The recent rounds and the failures before them, oldest first."""
        recent = {outcome.number for outcome in self.recent}
        return (*(failure for failure in self.kept_failures if failure.number not in recent), *self.recent)

    def _with_queries(self, queries: tuple[Query, ...]) -> Journal:
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


def _increased(counts: Mapping[str, int], key: str) -> Mapping[str, int]:
    return {**counts, key: counts[key] + 1}
