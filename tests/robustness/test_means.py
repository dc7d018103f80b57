"""Bounds of a mean of shares: against plain loops, over every order, and at the threshold, however answers depend."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.stats import binom

from dfmcl.common.errors import BadInput
from dfmcl.robustness.means import MARKS, STAKES, AnswerCounts, MeanSequence, Wealth, mean_lower_bound, mean_upper_bound
from dfmcl.robustness.records import AttackRecord, Evaluation
from dfmcl.robustness.statistics import lower_bound
from dfmcl.robustness.threats.linf import Linf

ALPHA, DRAWS = 0.05, 1000
LISTS = st.lists(st.integers(0, 4), min_size=1, max_size=40)


def answers(right: Sequence[int] | NDArray[np.int64], asked: int) -> AnswerCounts:
    return AnswerCounts(np.asarray(right, np.int64), asked)


def wealth(right: Sequence[int], asked: int, population: int, mark: int) -> float:
    """After these images, by one bet after another on fractions; infinite where the mean is impossible."""
    total, owned = mark * population * asked / MARKS, [1.0] * len(STAKES)
    for number, count in enumerate(right):
        rest = total - sum(right[:number])
        if rest < count - 1e-9:
            return math.inf
        mean = rest / asked / (population - number)
        owned = [one * (1 + a * count / asked) / (1 + a * mean) for one, a in zip(owned, STAKES, strict=True)]
    return sum(owned) / len(owned)


def hard_together(stream: np.random.Generator, images: int, kinds: int, share: float) -> NDArray[np.int64]:
    """Right answers `(images,)` of `kinds` each, that depend: an image is mostly right under all kinds, or none.

    The sum over the images is the largest below `share` of all answers.
    """
    right = stream.binomial(kinds, stream.beta(0.4 * share, 0.4 * (1 - share), images))
    wanted = math.ceil(share * images * kinds) - 1
    while (away := wanted - int(right.sum())) != 0:
        open_ = np.flatnonzero(right < kinds if away > 0 else right > 0)
        moved = stream.choice(open_, min(abs(away), len(open_)), replace=False)
        right[moved] += np.sign(away)
    return right


def test_at_the_threshold_a_model_passes_no_more_often_than_it_may() -> None:
    """1,000 orders of 150 images of which one answer is missing: however kinds depend, a gate that looks after each
    image is wrong in 5 % at most. A correct program fails with a chance below 1e-4 (exact binomial)."""
    stream, passed = np.random.default_rng(0), {0.25: 0, 0.6: 0, 0.9: 0}
    for share in passed:
        right = hard_together(stream, 150, 15, share)
        for _ in range(DRAWS):
            _, least = Wealth(150, 15).after(answers(stream.permutation(right), 15), 1 - ALPHA)
            passed[share] += bool((least >= share * 150 * 15).any())
    assert max(passed.values()) <= binom.isf(1e-4 / 3, DRAWS, ALPHA), passed
    assert max(passed.values()) > 0.005 * DRAWS  # nor does it never pass


def test_the_same_of_one_look() -> None:
    """1,000 samples of 100 images from a population whose mean is the bound's own border."""
    stream, wrong = np.random.default_rng(1), np.zeros(2, int)
    for _ in range(DRAWS):
        seen = answers(stream.binomial(15, stream.beta(0.24, 0.16, 100)), 15)
        wrong += (mean_lower_bound(seen, 1 - ALPHA) > 0.6, mean_upper_bound(seen, 1 - ALPHA) < 0.6)
    assert (wrong <= binom.isf(5e-5, DRAWS, ALPHA)).all(), wrong


def test_answers_counted_as_images_pass_too_often() -> None:
    """The harness can fail: Clopper-Pearson on 15 answers an image, as if they did not depend, errs in a third."""
    stream, wrong = np.random.default_rng(2), 0
    for _ in range(300):
        right = stream.binomial(15, stream.beta(0.24, 0.16, 100))
        wrong += lower_bound(int(right.sum()), 1500, 1 - ALPHA) > 0.6
    assert wrong > 0.2 * 300


@pytest.mark.parametrize("right", [(0, 1, 2, 4, 4, 1), (3, 3, 3, 3), (0, 0, 0, 0, 4)])
def test_a_bet_against_the_truth_is_fair(right: tuple[int, ...]) -> None:
    """Over all orders of a small data set, and at each look, the wealth against the true mean is 1 on average."""
    population, asked, mark = len(right), 4, sum(right) * MARKS / (4 * len(right))
    assert mark == int(mark)
    for images in range(population + 1):
        found = [wealth(order[:images], asked, population, int(mark)) for order in itertools.permutations(right)]
        assert np.mean(found) == pytest.approx(1)


@settings(max_examples=40, deadline=None)
@given(LISTS, st.integers(0, 30))
def test_bounds_are_the_means_that_no_bet_rejects(right: list[int], more: int) -> None:
    """Against a scan of all marks by plain loops; they never loosen, and end in the true count."""
    population = len(right) + more
    found = MeanSequence.begin(population, 4, 0.9).after(answers(right, 4))
    rejected = 0
    for images in range(1, len(right) + 1):
        seen = right[:images]
        while rejected < MARKS and wealth(seen, 4, population, rejected) >= 10 * (1 - 1e-9):
            rejected += 1
        share = found.lower[images - 1] / (4 * population)
        assert share >= (rejected - 1) / MARKS or found.lower[images - 1] == 4 * population - (4 * images - sum(seen))
        assert (
            sum(seen) <= found.lower[images - 1] <= found.upper[images - 1] <= 4 * population - 4 * images + sum(seen)
        )
    # No mark above is rejected, but for what rounds to the next count.
    assert found.lower[-1] <= max(sum(right), rejected * 4 * population // MARKS + 1)
    assert (np.diff(found.lower) >= 0).all()
    if not more:
        assert found.lower[-1] == found.upper[-1] == sum(right)


@settings(max_examples=30, deadline=None)
@given(LISTS, st.lists(st.integers(0, 40), max_size=4))
def test_cuts_make_no_difference(right: list[int], cuts: list[int]) -> None:
    """One image at a time, in blocks or at once: the same bounds."""
    whole = MeanSequence.begin(60, 4, 0.95).after(answers(right, 4))
    parts = MeanSequence.begin(60, 4, 0.95)
    for block in np.split(np.array(right), sorted(cuts)):
        parts = parts.after(answers(block, 4))
    assert whole.lower.tolist() == parts.lower.tolist()
    assert whole.upper.tolist() == parts.upper.tolist()


def test_cuts_of_a_long_order_make_no_difference() -> None:
    """Over several chunks, where wealth overflows and stakes are lost."""
    stream = np.random.default_rng(5)
    right = stream.binomial(5, 0.8, 700)
    whole = MeanSequence.begin(700, 5, 0.95).after(answers(right, 5))
    parts = MeanSequence.begin(700, 5, 0.95)
    for block in np.split(right, [1, 33, 64, 65, 400]):
        parts = parts.after(answers(block, 5))
    assert whole.lower.tolist() == parts.lower.tolist()
    assert whole.upper.tolist() == parts.upper.tolist()
    assert whole.lower[-1] == whole.upper[-1] == right.sum()


@given(LISTS, st.floats(0.5, 0.999))
def test_one_look_is_the_mean_at_which_a_bet_just_wins(right: list[int], confidence: float) -> None:
    """Just below the bound the mixture owns 1 / alpha, just above it does not; the upper bound is its mirror."""
    seen = answers(right, 4)
    low, high = mean_lower_bound(seen, confidence), mean_upper_bound(seen, confidence)
    assert 0 <= low <= np.mean(right) / 4 <= high <= 1

    def owned(mean: float) -> float:
        return float(np.mean([np.prod([(1 + a * x / 4) / (1 + a * mean) for x in right]) for a in STAKES]))

    if low > 1e-6:
        assert owned(low * (1 - 1e-7)) * (1 - confidence) >= 1 - 1e-5
    assert owned(low + 1e-6) * (1 - confidence) < 1 + 1e-9
    assert mean_upper_bound(seen.turned, confidence) == pytest.approx(1 - low)


def test_shares_that_differ_little_are_bounded_closer() -> None:
    """The same mean of images that are all alike needs far fewer of them than of images that are all or nothing."""
    alike, apart = answers([3] * 200, 5), answers([5] * 120 + [0] * 80, 5)
    assert mean_lower_bound(alike, 0.95) > 0.58 > 0.52 > mean_lower_bound(apart, 0.95) > 0.45


def test_an_answer_is_the_worst_over_attacks_of_one_threat() -> None:
    """Three threats: an image's share counts those under which it held, and it was right as it came."""
    held = [(True, True, False), (True, False, False), (False, True, False)]
    records = [
        Evaluation(
            Linf(0.1), True, 0, (True, True, False), (AttackRecord("grid", {}, flags, (True,) * 3, 0, 0.0),), 0.0
        )
        for flags in held
    ]
    found = AnswerCounts.of(records)
    assert (found.right.tolist(), found.asked) == ([2, 2, 0], 3)
    assert (found.share.k, found.share.n) == (4, 9)
    assert (found[np.array([True, False, True])] + found[:1]).right.tolist() == [2, 0, 2]


def test_what_is_no_sample_is_refused() -> None:
    """More right answers than were asked for, more images than there are, no doubt left, no image at all."""
    with pytest.raises(BadInput, match="means: right answers"):
        answers([5], 4)
    with pytest.raises(BadInput, match="means: 3 images of 2"):
        MeanSequence.begin(2, 4, 0.9).after(answers([1, 1, 1], 4))
    with pytest.raises(BadInput, match="means: "):
        MeanSequence.begin(2, 4, 1.0)
    assert (mean_lower_bound(AnswerCounts.none(4), 0.9), mean_upper_bound(AnswerCounts.none(4), 0.9)) == (0.0, 1.0)
