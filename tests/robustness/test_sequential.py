"""The sequential bounds against exact computations: every order of a small data set, every count, every look."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dfmcl.common.errors import BadInput
from dfmcl.robustness.sequential import ConfidenceSequence, log_wealth
from dfmcl.robustness.statistics import lower_bound

ALPHA = 0.05


def crossing_probability(population: int, successes: int, crossed: np.ndarray) -> float:
    """P(a random order ever enters `crossed[t, s]`), exactly, by recursion over all numbers s of successes after t."""
    reach, entered = np.zeros(population + 2), 0.0
    reach[0] = 1.0
    for t in range(population):
        share = (successes - np.arange(population + 2)).clip(0) / (population - t)
        after = reach * (1 - share)
        after[1:] += (reach * share)[:-1]
        entered += after[crossed[t + 1]].sum()
        reach = np.where(crossed[t + 1], 0.0, after)
    return entered


def grid(population: int) -> tuple[np.ndarray, np.ndarray]:
    """Images seen and successes among them, both `(population + 1, population + 2)`."""
    seen, successes = np.mgrid[: population + 1, : population + 2]
    return seen, np.minimum(successes, seen)


@pytest.mark.parametrize("population", [7, 40, 250])
@pytest.mark.parametrize("share", [0.1, 0.45, 0.9])
def test_false_pass_is_at_most_alpha_over_all_orders_and_looks(population: int, share: float) -> None:
    """The count is one below the threshold, the worst case, and one looks after every image."""
    null = int(np.ceil(share * population)) - 1
    seen, successes = grid(population)
    with np.errstate(invalid="ignore"):
        crossed = log_wealth(successes, seen, population, null) >= -np.log(ALPHA)
    assert crossing_probability(population, null, crossed) <= ALPHA


def test_fixed_sample_bounds_looked_at_again_and_again_pass_too_often() -> None:
    """The harness can fail: Clopper-Pearson, valid for one look, passes a bad model far more often than 5 %."""
    population, null = 250, 112
    crossed = np.zeros((population + 1, population + 2), bool)
    for t in range(1, population + 1):
        crossed[t, : t + 1] = [lower_bound(s, t, 1 - ALPHA) > null / population for s in range(t + 1)]
    assert crossing_probability(population, null, crossed) > 3 * ALPHA


def test_drawing_with_replacement_would_be_another_bet() -> None:
    """A mean that does not know what was drawn already is no fair price: the expectation of the wealth is not kept."""
    population, null, seen, successes = 50, 20, 30, 5
    now, up, down = (
        np.exp(log_wealth(successes + x, seen + step, population, null)) for x, step in ((0, 0), (1, 1), (0, 1))
    )
    fair, careless = (null - successes) / (population - seen), null / population
    assert fair * up + (1 - fair) * down == pytest.approx(now)
    assert abs(careless * up + (1 - careless) * down - now) > 0.05 * now


@given(st.data())
def test_wealth_is_a_fair_game(data: st.DataObject) -> None:
    """Under the null the expectation after the next image is the wealth now, and less only at the borders."""
    population = data.draw(st.integers(2, 400))
    null = data.draw(st.integers(1, population - 1))
    seen = data.draw(st.integers(0, population - 1))
    successes = data.draw(st.integers(max(0, seen - (population - null)), min(seen, null)))
    share = (null - successes) / (population - seen)
    now = float(np.exp(log_wealth(successes, seen, population, null)))
    with np.errstate(over="ignore"):
        up = float(np.exp(log_wealth(successes + 1, seen + 1, population, null))) if share > 0 else 0.0
        down = float(np.exp(log_wealth(successes, seen + 1, population, null))) if share < 1 else 0.0
    expected = share * up + (1 - share) * down
    assert expected <= now * (1 + 1e-6)
    if seen < min(null, 0.2 * population) and null < 0.5 * population:  # no belief is anywhere near refuted
        assert expected == pytest.approx(now, rel=1e-6)


@pytest.mark.parametrize("seed", range(5))
def test_bounds_are_the_counts_that_no_bet_rejects(seed: int) -> None:
    """Against a scan of all counts at each image; they never loosen, hold the true count, and end in it."""
    stream = np.random.default_rng(seed)
    population = 60
    outcomes = stream.permutation(np.arange(population) < stream.integers(5, 56))
    sequence = ConfidenceSequence(population, 1 - ALPHA).after(outcomes)
    best_low, best_high = 0, population
    for t in range(1, population + 1):
        s = int(outcomes[:t].sum())
        counts = np.arange(s, population - (t - s) + 1)
        left = counts[log_wealth(s, t, population, counts) < -np.log(ALPHA)]
        right = counts[log_wealth(t - s, t, population, population - counts) < -np.log(ALPHA)]
        best_low = min(max(best_low, int(left.min())), population - (t - s))
        best_high = max(min(best_high, int(right.max())), s)
        assert (sequence.lower[t - 1], sequence.upper[t - 1]) == (best_low, best_high)
    assert sequence.lower[-1] == sequence.upper[-1] == outcomes.sum()


def test_cuts_make_no_difference_and_the_first_crossing_decides() -> None:
    """One image at a time, in blocks or at once: the same bounds, and the same verdict after as many images."""
    outcomes = np.random.default_rng(3).random(2000) < 0.55
    whole = ConfidenceSequence(2000, 0.95).after(outcomes)
    parts = ConfidenceSequence(2000, 0.95)
    for block in np.split(outcomes, [1, 2, 40, 700]):
        parts = parts.after(block)
    assert (whole.lower == parts.lower).all()
    assert (whole.upper == parts.upper).all()
    assert ConfidenceSequence(2000, 0.95).bounds == (0.0, 1.0)
    assert ConfidenceSequence(2000, 0.95).decision(0.5) == ("open", 0)
    verdict, images = whole.decision(0.45)
    assert verdict == "met"
    assert whole.lower[images - 1] >= 900 > whole.lower[images - 2]
    assert ConfidenceSequence(2000, 0.95).after(outcomes[: images - 1]).decision(0.45) == ("open", images - 1)
    assert whole.decision(0.65)[0] == "missed"


@pytest.mark.parametrize(
    ("population", "confidence", "outcomes"), [(0, 0.9, [1]), (5, 1.0, [1]), (2, 0.9, [1, 0, 1]), (5, 0.9, [2])]
)
def test_what_is_no_sample_is_refused(population: int, confidence: float, outcomes: list[int]) -> None:
    """No images, no doubt left, more outcomes than images, or outcomes that are none."""
    with pytest.raises(BadInput, match="sequential: "):
        ConfidenceSequence(population, confidence).after(np.array(outcomes))
