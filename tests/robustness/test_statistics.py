"""Exact bounds and paired tests against other computations of them, and HyperScore's arithmetic."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest

from dfmcl.common.errors import BadInput
from dfmcl.robustness.hyperscore import combined_value, hyperscore
from dfmcl.robustness.statistics import PairedCounts, bootstrap_difference, clopper_pearson, lower_bound, upper_bound


def tail(k: int, n: int, p: float) -> float:
    """P(X >= k) for a binomial, summed term by term."""
    return sum(math.comb(n, i) * p**i * (1 - p) ** (n - i) for i in range(k, n + 1))


@pytest.mark.parametrize(("k", "n"), [(1, 1), (3, 10), (10, 10), (226, 450), (1, 60)])
def test_lower_bound_solves_the_binomial_tail(k: int, n: int) -> None:
    """At the bound, seeing k or more has probability exactly 1 - confidence."""
    assert tail(k, n, lower_bound(k, n, 0.95)) == pytest.approx(0.05, rel=1e-6)


@given(st.integers(1, 500).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))), st.floats(0.5, 0.999))
def test_bounds_are_mirror_images(counts: tuple[int, int], confidence: float) -> None:
    """The upper bound of successes is one minus the lower bound of failures, and both enclose the estimate."""
    k, n = counts
    assert upper_bound(k, n, confidence) == pytest.approx(1 - lower_bound(n - k, n, confidence), abs=1e-9)
    assert lower_bound(k, n, confidence) <= k / n <= upper_bound(k, n, confidence)


def test_coverage_is_at_least_the_confidence() -> None:
    """Over all outcomes of n = 40, the two-sided 95 % interval misses with probability at most 5 %."""
    for p in (0.01, 0.2, 0.45, 0.5, 0.9):
        hit = sum(
            math.comb(40, k) * p**k * (1 - p) ** (40 - k)
            for k in range(41)
            if clopper_pearson(k, 40)[0] <= p <= clopper_pearson(k, 40)[1]
        )
        assert hit >= 0.95


@pytest.mark.parametrize("arguments", [(5, 4, 0.9), (-1, 4, 0.9), (0, 0, 0.9), (1, 2, 1.0), (1, 2, 0.0)])
def test_impossible_counts_are_refused(arguments: tuple[int, int, float]) -> None:
    """More successes than trials, no trials, or certainty: bad input."""
    with pytest.raises(BadInput, match="statistics"):
        lower_bound(*arguments)


def test_hyperscore_matches_its_formula_at_one() -> None:
    """At V = 1 the exponent is gamma: sigmoid(-ln 2) = 1/3, squared 1/9."""
    assert hyperscore(1.0) == pytest.approx(100 * (1 + 1 / 9))


@given(st.floats(1e-6, 1), st.floats(1e-6, 1))
def test_hyperscore_only_ranks(a: float, b: float) -> None:
    """It is monotone in V: no order changes."""
    assert (hyperscore(a) <= hyperscore(b)) == (a <= b) or hyperscore(a) == pytest.approx(hyperscore(b))


def test_combined_value_is_a_weighted_mean() -> None:
    """Weights need not sum to one; a missing figure is bad input."""
    assert combined_value({"clean": 1.0, "white": 0.5}, {"clean": 1, "white": 3}) == pytest.approx(0.625)
    with pytest.raises(BadInput, match="black"):
        combined_value({"clean": 1.0}, {"clean": 1, "black": 1})


@given(st.integers(0, 40), st.integers(0, 40), st.integers(0, 20))
def test_mcnemar_is_the_exact_binomial_test(only_first: int, only_second: int, both: int) -> None:
    """Against scipy's own binomial test, from the flags."""
    first = np.array([True] * only_first + [False] * only_second + [True] * both + [False])
    second = np.array([False] * only_first + [True] * only_second + [True] * both + [False])
    counts = PairedCounts.of(first, second)
    assert (counts.only_first, counts.only_second) == (only_first, only_second)
    differing = only_first + only_second
    expected = binomtest(only_first, differing, 0.5).pvalue if differing else 1.0
    assert counts.p == pytest.approx(expected)


def test_mcnemar_closed_form() -> None:
    """Five images, all on one side: 2 * (1/2)^5."""
    assert PairedCounts(5, 0).p == pytest.approx(0.0625)
    assert PairedCounts(3, 3).p == 1.0


def test_bootstrap_interval_is_the_normal_one_on_many_images() -> None:
    """One seed, 4,000 images: difference +- 1.96 standard errors, and mirrored when the methods change places."""
    stream = np.random.default_rng(1)
    first, second = stream.random((1, 4000)) < 0.5, stream.random((1, 4000)) < 0.45
    difference = first.astype(float) - second
    error = 1.96 * difference.std() / np.sqrt(4000)
    low, high = bootstrap_difference(first, second)
    assert (low, high) == pytest.approx((difference.mean() - error, difference.mean() + error), abs=0.001)
    assert bootstrap_difference(second, first) == pytest.approx((-high, -low), abs=0.001)


def test_bootstrap_interval_knows_the_seeds() -> None:
    """Two seeds that disagree, on images without number: the interval spans them both, as a seed may be drawn twice."""
    first = np.array([[True] * 500, [False] * 500])
    second = ~first
    assert bootstrap_difference(first, second) == (-1.0, 1.0)
    assert bootstrap_difference(first, first) == (0.0, 0.0)


def test_pairs_must_be_pairs() -> None:
    """Flags of different images, or of none, are refused."""
    for shapes in (((1, 3), (1, 4)), ((1, 0), (1, 0))):
        with pytest.raises(BadInput, match="are no pairs"):
            bootstrap_difference(np.zeros(shapes[0], bool), np.zeros(shapes[1], bool))
