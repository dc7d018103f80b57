"""What the images seen so far prove about a whole data set, however often one looks.

N images are seen one by one in random order without replacement, and an unknown number K of them succeed (are right,
hold under attack). The claim is about exactly these N images, not about a population they came from; chance is in the
order alone, which must not depend on the outcomes.

A gambler bets against each candidate K = k. Given S successes among t images seen, the next one succeeds with
probability m = (k - S) / (N - t) if k is true; a stake that pays 1 + lambda * (x - m) for outcome x is fair. Who
starts with 1 and bets fairly, never into debt, owns 1 / alpha at any time with probability at most alpha (Ville 1939):
a candidate against which so much was won is rejected, at whichever look. That is betting as in Waudby-Smith & Ramdas
2024, "Estimating means of bounded random variables by betting", section 5, for sampling without replacement.

Which bets: belief in another count k' > k bets lambda = (m' - m) / (m (1 - m)), with m' = (k' - S) / (N - t),
and then owns the likelihood ratio of k' to k, the most that any bet can grow if k' is true. The true count being
unknown, the capital is divided at the start between nine such beliefs, a log-odds ratio of 0.08 to 1.28 above k (2 to
28 points at a share of one half): that costs at most log 9 = 2.2 of log-wealth, and as neighbours win together, far
less. Ratios of hypergeometric likelihoods, as in Waudby-Smith & Ramdas 2020, "Confidence sequences for sampling
without replacement", which takes a beta-binomial prior over all counts: that one stakes most on differences so large
that a handful of images shows them, and needs half as many images again at 5 points (`make bench-gate`).

Why one candidate speaks for all below it: k' - k is concave in k and 0 at both ends, so that each factor
(k' - i) / (k - i) and (N - k' - j) / (N - k - j) falls as k grows. What rejects k rejects every smaller count, and the
counts that are left have a smallest one, found by bisection. Upper bounds are lower bounds of the failures.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import gammaln

from dfmcl.common.errors import BadInput
from dfmcl.robustness.statistics import Flags

Counts = NDArray[np.int64]
Floats = NDArray[np.float64]

# How far above the tested count the bets' beliefs lie; closer together, they gained nothing. Range chosen by the
# exact distribution of stopping times: at N = 10,000 and thresholds of 0.3 and 0.45 the median is within 40 % of what a
# bet that knows the true share needs, from 2 to 20 points above. A wider range costs there what it gains beyond.
LOG_ODDS = tuple((0.08 * 2 ** (np.arange(9) / 2)).tolist())
# For a share near 0 or 1, such as that of images lost to a second suite: where none is, the count is believed to be 0.
RARE = tuple((0.5 * 2 ** (np.arange(9) / 2)).tolist())


def log_wealth(
    successes: ArrayLike,
    seen: ArrayLike,
    population: int,
    null: ArrayLike,
    log_odds: Sequence[float] = LOG_ODDS,
) -> Floats:
    """Log of what was won, from a stake of 1, by betting that more than `null` of the `population` images succeed.

    log_odds: how far above the null the beliefs lie.
    Counts of any broadcastable shapes in, that shape out. Under `null` its exponential is a nonnegative martingale (a
    supermartingale from where the null or a belief leaves only one outcome). +inf: the null is impossible, there were
    more successes; -inf: nothing is left, as after more failures than the null has, which speak for even less.
    """
    successes, seen, null = np.broadcast_arrays(*(np.asarray(counts, float) for counts in (successes, seen, null)))
    failures = seen - successes
    # As a distance from the null, so that at shares of 0 and 1, which no odds ratio moves, it is exactly zero.
    more = np.exp(log_odds) - 1
    excess = more * (null * (population - null) / population)[..., None]
    beliefs = null[..., None] + excess / (1 + more * (null / population)[..., None])
    believed = _log_likelihood(successes[..., None], failures[..., None], population, beliefs)
    mean = np.logaddexp.reduce(believed, axis=-1) - np.log(len(more))
    with np.errstate(invalid="ignore"):  # -inf less -inf, where the null is impossible: replaced by what follows
        wealth = mean - _log_likelihood(successes, failures, population, null)
    return np.where(successes > null, np.inf, np.where(failures > population - null, -np.inf, wealth))


@dataclass(frozen=True)
class ConfidenceSequence:
    """Which numbers of successes in the whole population are left after each of the T images seen.

    `lower` and `upper` are counts `(T,)`, both included. Each is one-sided: the probability that it is ever wrong,
    over all T at once, is at most 1 - `confidence`; the two together are wrong at most twice as often. They never
    loosen, save where what was seen contradicts a bound that was wrong; at T = population both are the true count.
    """

    population: int
    confidence: float
    outcomes: Flags = field(default_factory=lambda: np.zeros(0, bool))
    lower: Counts = field(default_factory=lambda: np.zeros(0, np.int64))
    upper: Counts = field(default_factory=lambda: np.zeros(0, np.int64))
    log_odds: tuple[float, ...] = LOG_ODDS

    def __post_init__(self) -> None:
        if self.population < 1:
            raise BadInput(f"sequential: a population of {self.population} images; it needs at least one")
        if not 0 < self.confidence < 1:
            raise BadInput(f"sequential: confidence is {self.confidence}; it must lie between 0 and 1")

    def after(self, outcomes: Flags) -> ConfidenceSequence:
        """With the next outcomes `(M,)` in the fixed order; the cost depends on M alone. Cuts make no difference."""
        outcomes = _flags(outcomes)
        together = np.concatenate([self.outcomes, outcomes])
        if len(together) > self.population:
            raise BadInput(f"sequential: {len(together)} outcomes from a population of {self.population} images")
        known = len(self.outcomes)
        seen = np.arange(known + 1, len(together) + 1)
        successes = int(self.outcomes.sum()) + np.cumsum(outcomes)
        failures = seen - successes
        lower = _never_looser(self.lower, self._least(successes, seen), self.population - failures)
        fewest_failures = _never_looser(
            self.population - self.upper, self._least(failures, seen), self.population - successes
        )
        upper = self.population - fewest_failures
        return replace(self, outcomes=together, lower=lower, upper=upper)

    @property
    def bounds(self) -> tuple[float, float]:
        """Lower and upper bound of the share of successes, as of now."""
        if not len(self.outcomes):
            return 0.0, 1.0
        return float(self.lower[-1]) / self.population, float(self.upper[-1]) / self.population

    def decision(self, threshold: float) -> tuple[str, int]:
        """Is the share at least `threshold`? ("met" | "missed" | "open", after how many images).

        The first bound to reach the threshold decides, and what comes later changes nothing: the verdict does not
        depend on when one looked. Falsely met, or falsely missed: each with probability at most 1 - `confidence`.
        """
        met, missed = self.lower / self.population >= threshold, self.upper / self.population < threshold
        decided = np.flatnonzero(met | missed)
        if not len(decided):
            return "open", len(self.outcomes)
        first = int(decided[0])
        return "met" if met[first] else "missed", first + 1

    def _least(self, successes: Counts, seen: Counts) -> Counts:
        """The smallest count not rejected `(T,)`, by bisection over what is possible: S to S + (N - t)."""
        low, high = successes, successes + self.population - seen
        while (low < high).any():
            middle = (low + high) // 2
            wealth = log_wealth(successes, seen, self.population, middle, self.log_odds)
            rejected = wealth >= -np.log1p(-self.confidence)
            low, high = np.where(rejected, middle + 1, low), np.where(rejected, high, middle)
        return low


def _never_looser(before: Counts, least: Counts, possible: Counts) -> Counts:
    """`before` and its continuation by `least`: a count once rejected stays so, but what was seen outweighs any bet."""
    tightest = np.maximum.accumulate(np.concatenate([before, least]))[len(before) :]
    return np.concatenate([before, np.minimum(tightest, possible)])


def _log_likelihood(successes: Floats, failures: Floats, population: int, count: Floats) -> Floats:
    """Log of count (count - 1) ... for the successes, times the same for the failures: of any order of them, up to what
    does not depend on `count`, which need not be whole. -inf where there are more of either than `count` has.
    """
    rest = population - count
    possible = (successes <= count) & (failures <= rest)
    ones = gammaln(count + 1) - gammaln(np.where(possible, count - successes, 0) + 1)
    zeros = gammaln(rest + 1) - gammaln(np.where(possible, rest - failures, 0) + 1)
    return np.where(possible, ones + zeros, -np.inf)


def _flags(outcomes: Any) -> Flags:
    """Outcomes `(M,)` as flags: bools, or numbers that are 0 or 1."""
    array = np.asarray(outcomes)
    if array.ndim != 1 or not np.isin(array, (0, 1)).all():
        raise BadInput(f"sequential: outcomes of shape {array.shape} must be one row of 0 and 1")
    return array.astype(bool)
