"""Bounds of a mean accuracy: their claims, by enumeration, by property, simulated where a breach would be seen."""

from __future__ import annotations

import itertools
import math
from functools import cache

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binom, hypergeom

from benchmarks.bounds import IMAGES, POOL, drawn, now_judged
from dfmcl.monitoring.bounds import (
    EVIDENCE,
    LONGEST,
    RATIOS,
    WINDOWS,
    Bounds,
    after_all,
    least_rejected,
    limit,
    rejects,
    undivided,
    windows_of,
)
from dfmcl.monitoring.round_log import READ_AGAIN

Rounds = list[tuple[int, int]]
# Stretches of rounds, each with a count of its own, as if an accuracy jumped: (right, images) of each round.
one_round = st.integers(1, 24).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n)))
stretches = st.lists(st.tuples(one_round, st.integers(1, 20)), max_size=6)
rounds = stretches.map(lambda parts: [counts for counts, times in parts for _ in range(times)])
limits = st.sampled_from([20.0, 1e4, limit(43_200, 10)])


def bets(p: float, outcomes: Rounds) -> float:
    """What a stake that is divided among all bets makes of 1 against p: ratios of likelihoods, image by image."""
    total = 0.0
    for ratio in RATIOS:
        believed, own = ratio * p / (1 - p + ratio * p), 1.0
        for right, images in outcomes:
            own *= (believed / p) ** right * ((1 - believed) / (1 - p)) ** (images - right)
        total += own / len(RATIOS)
    return total


@pytest.mark.parametrize("p", [0.2, 0.5, 0.8])
def test_stakes_are_likelihood_ratios(p: float) -> None:
    """Against the product over images, a stake a round: together they own that much, and no more."""
    outcomes = [(3, 8), (5, 8), (0, 4)]
    owned = sum(bets(p, outcomes[begin:]) for begin in range(len(outcomes)))
    right, images = (np.cumsum(counts[::-1]) for counts in np.transpose(outcomes))
    assert rejects(right, images, np.array(p), owned * (1 - 1e-9))
    assert not rejects(right, images, np.array(p), owned * (1 + 1e-9))


def answering(path: tuple[int, ...]) -> int:
    """Good images of a pool of 5 in the next round, of a model that gets worse the luckier it was."""
    return 5 - sum(path) // 2 if path else 4


def test_no_stake_grows_on_average() -> None:
    """Priced with the mean accuracy of its rounds, whatever that came to, and though each round's accuracy answers to
    the draws before it: over every path of four rounds of 2 of 5 images. Priced for less, it does grow."""

    def mean_of(path: tuple[int, ...]) -> float:
        return sum(answering(path[:at]) for at in range(4)) / 20

    chances, owned, cheaper = [], [], []
    for path in itertools.product(range(3), repeat=4):
        chances.append(math.prod(hypergeom.pmf(k, 5, answering(path[:at]), 2) for at, k in enumerate(path)))
        owned.append(bets(mean_of(path), [(k, 2) for k in path]))
        cheaper.append(bets(mean_of(path) - 0.3, [(k, 2) for k in path]))
    assert math.fsum(chances) == pytest.approx(1)
    assert np.dot(chances, owned) <= 1
    coins = [bets(0.4, [(k, 6)]) * binom.pmf(k, 6, 0.4) for k in range(7)]
    assert math.fsum(coins) == pytest.approx(1)
    assert np.dot(chances, cheaper) < np.dot(chances, owned)  # a stake against less owns less
    falling = [bets(0.4, [(k, 6)]) * binom.pmf(k, 6, 0.3) for k in range(7)]
    assert math.fsum(falling) > 1


@pytest.mark.parametrize(
    "truth", [(0.8,) * 5, (0.9, 0.9, 0.9, 0.1, 0.1), (0.2, 0.2, 0.9, 0.9, 0.9), (0.9, 0.1, 0.9, 0.1, 0.9)]
)
@pytest.mark.parametrize(("allowed", "holds"), [(0.4, True), (40.0, False)], ids=["as claimed", "a limit too low"])
def test_the_chance_of_a_false_bound_is_as_claimed(truth: tuple[float, ...], allowed: float, holds: bool) -> None:
    """Over every path of five rounds of two images, through drops and rises: the chance that the interval of any
    stretch is ever wrong about its mean, or that no stretch is below what one should be. Both sides together."""
    enough, chance = len(truth) * 2 / allowed, 0.0
    for path in itertools.product(range(3), repeat=len(truth)):
        if ever_wrong(path, truth, enough):
            chance += math.prod(binom.pmf(right, 2, q) for right, q in zip(path, truth, strict=True))
    assert chance > 0
    assert (chance <= 0.4) == holds


def ever_wrong(path: tuple[int, ...], truth: tuple[float, ...], enough: float) -> bool:
    """Whether one of the bounds of one of the stretches of these rounds is."""
    for end in range(1, len(path) + 1):
        means = [float(np.mean(truth[begin:end])) for begin in range(end)]
        bounds = [after_pairs(path[begin:end], enough) for begin in range(end)]
        if any(not one.lower < mean < one.upper for one, mean in zip(bounds, means, strict=True)):
            return True
        if bounds[0].stretch_upper <= min(means):
            return True
    return False


@cache
def after_pairs(path: tuple[int, ...], enough: float) -> Bounds:
    """After rounds of two images each; so many were right."""
    return after_all(Bounds(enough), [(right, 2) for right in path])


def simulated_truths() -> dict[str, np.ndarray]:
    return {
        "steady": np.full(120, 0.75),
        "drop": np.r_[np.full(60, 0.9), np.full(60, 0.6)],
        "rise": np.r_[np.full(60, 0.3), np.full(60, 0.5)],
        "drift": np.linspace(0.9, 0.5, 120),
        "in turn": np.tile([0.9, 0.6], 60),
    }


STREAMS, PROMISED = 100, 0.2
# More streams than these are wrong, were each so with the chance that is promised, once in a million draws; the seeds
# are fixed, and the bounds err on the safe side by far more.
TOLERATED = int(binom.isf(1e-6, STREAMS, PROMISED))


@pytest.mark.parametrize("name", simulated_truths())
def test_false_bounds_are_as_rare_as_is_claimed(name: str) -> None:
    """Looked at after every round of 120, whatever the accuracy does, in 20 % of the streams at most a bound is ever
    wrong about the mean that it is about."""
    truth = simulated_truths()[name]
    right = drawn(np.random.default_rng(0), truth, STREAMS)
    assert now_judged(right, truth, 0.5, PROMISED).wrong_of_seen.any(axis=1).sum() <= TOLERATED


def test_a_limit_too_low_is_caught() -> None:
    """The test above can fail: with the limit of one look, too many streams are wrong."""
    truth = simulated_truths()["steady"]
    right = drawn(np.random.default_rng(0), truth, STREAMS)
    assert now_judged(right, truth, 0.5, 120 * PROMISED).wrong_of_seen.any(axis=1).sum() > TOLERATED


def test_the_simulation_is_the_code() -> None:
    """What it finds of a stream is what Bounds says of these rounds."""
    truth = np.r_[np.full(20, 0.9), np.full(20, 0.5)]
    right = drawn(np.random.default_rng(0), truth, 3)
    found = now_judged(right, truth, 0.8, PROMISED)
    for stream, end in itertools.product(range(3), range(1, 41)):
        bounds = after_all(Bounds(limit(43_200, 10)), [(int(k), IMAGES) for k in right[stream, :end]])
        assert found.outside[stream, end - 1] == (not bounds.lower < truth[end - 1] < bounds.upper)
        assert found.paged[stream, end - 1] == (bounds.stretch_upper < 0.8)


@given(rounds, limits)
def test_the_bounds_keep_order(outcomes: Rounds, enough: float) -> None:
    """Whatever the rounds were: the share of the window's own images lies between them, and so lower is never above
    upper; the mean of a part of the window is bounded by no more than that of the whole."""
    bounds = after_all(Bounds(enough), outcomes)
    window = outcomes[len(outcomes) - bounds.rounds :]
    share = sum(k for k, _ in window) / sum(n for _, n in window) if window else 0.5
    assert 0 <= bounds.lower <= share <= bounds.upper <= 1
    assert bounds.lower < bounds.upper
    assert bounds.stretch_upper <= bounds.upper


@given(rounds, limits)
def test_lower_is_upper_of_the_failures(outcomes: Rounds, enough: float) -> None:
    """Right and wrong are treated alike."""
    bounds = after_all(Bounds(enough), outcomes)
    mirrored = after_all(Bounds(enough), [(n - k, n) for k, n in outcomes])
    assert bounds.rounds == mirrored.rounds
    assert bounds.lower == pytest.approx(1 - mirrored.upper)


@given(st.integers(0, 299), st.integers(1, 300), limits)
def test_one_more_right_answer_never_lowers_a_bound(right: int, images: int, enough: float) -> None:
    """Neither bound of a window goes down where an image that was wrong is right."""
    right = min(right, images - 1)
    old, new = (least_rejected(np.array([k]), np.array([images]), enough) for k in (right, right + 1))
    assert new >= old
    old, new = (least_rejected(np.array([images - k]), np.array([images]), enough) for k in (right, right + 1))
    assert new <= old


@given(rounds)
def test_the_window_is_the_longest_without_a_change(outcomes: Rounds) -> None:
    """Against a plain loop: it grows until a cut divides it into parts that two accuracies explain far better."""

    def surprise(k: int, n: int) -> float:
        return sum(x * math.log(x / n) for x in (k, n - k) if x)

    def divided(window: int) -> bool:
        k, n = (sum(counts) for counts in zip(*outcomes[-window:], strict=True))
        for part in windows[: windows.index(window)]:
            j, m = (sum(counts) for counts in zip(*outcomes[-part:], strict=True))
            if surprise(j, m) + surprise(k - j, n - m) - surprise(k, n) >= EVIDENCE:
                return True
        return False

    windows = [int(window) for window in WINDOWS if window < len(outcomes)] + [len(outcomes)]
    even = list(itertools.takewhile(lambda window: not divided(window), windows)) if outcomes else [0]
    assert after_all(Bounds(1e6), outcomes).rounds == even[-1]


def test_windows_of_many_streams_are_chosen_at_once() -> None:
    """As they are for each by itself."""
    right = np.cumsum([[5] * 12, [0] * 4 + [10] * 8, [10, 0] * 6], axis=1)[:, windows_of(12) - 1]
    images = np.broadcast_to(10 * windows_of(12), right.shape)
    assert undivided(right, images).tolist() == [undivided(row, images[0]).item() for row in right]
    assert undivided(right, images).tolist() == [7, 3, 0]


def test_nothing_proves_nothing() -> None:
    """Before the first round, and after rounds without images, every accuracy is possible."""
    bounds = Bounds(10.0)
    assert (bounds.lower, bounds.upper, bounds.stretch_upper) == (0.0, 1.0, 1.0)
    assert (bounds.rounds, bounds.start) == (0, 0.0)
    assert bounds.after(0, 0, 1.0) is bounds


def test_the_limit_is_looks_and_bounds_over_risk() -> None:
    """A month of a round a minute and the stakes from before it, two bounds, 1 %; less than one round counts as one."""
    assert limit(43_200, 2, 0.01) == pytest.approx(200 * (43_200 + LONGEST))
    assert limit(0.1, 2, 0.01) == 200 * (1 + LONGEST)


def test_a_window_knows_when_it_began() -> None:
    """A round a minute, right and then wrong: what is about the later ones began with them."""
    bounds = Bounds(limit(43_200, 8))
    for number in range(48):
        bounds = bounds.after(32 if number < 32 else 0, 32, 60.0 * number)
    assert (bounds.rounds, bounds.start) == (16, 60.0 * 32)
    assert bounds.upper < 0.1


def test_older_rounds_than_the_longest_window_do_not_count() -> None:
    """So that what a restart reads again is enough for the very same bounds, of rounds by both ways in turn."""
    outcomes = [(int(k), 8) for k in np.random.default_rng(0).binomial(8, 0.7, LONGEST + 50)]
    whole, again = (after_all(Bounds(1e7), part) for part in (outcomes, outcomes[-LONGEST:]))
    assert whole.rounds == LONGEST == WINDOWS[-1]
    assert (whole.lower, whole.upper, whole.stretch_upper) == (again.lower, again.upper, again.stretch_upper)
    assert READ_AGAIN >= 2 * LONGEST


def rounds_until(outcomes: Rounds, start: int, level: float) -> int:
    """After how many of the rounds from `start` on a stretch is proven to be below a level."""
    bounds = after_all(Bounds(limit(43_200, 8)), outcomes[:start])
    for number, (right, images) in enumerate(outcomes[start:], 1):
        bounds = bounds.after(right, images, 0.0)
        if bounds.stretch_upper < level:
            return number
    raise AssertionError("never proven")


def test_a_late_change_is_seen_as_quickly_as_an_early_one() -> None:
    """A fall from 26 to 13 of 32 is proven as soon after 1,000 good rounds as after none: each round is the start of a
    stretch of its own, so that what was before takes nothing away."""
    early, late = rounds_until([(13, 32)] * 20, 0, 0.7), rounds_until([(26, 32)] * 1000 + [(13, 32)] * 20, 1000, 0.7)
    assert late <= early <= 10


def test_recovery_does_not_take_as_long_as_the_loss() -> None:
    """After 1,000 rounds in which nothing was right, five in which 28 of 32 were free any threshold up to 65 %: rounds
    before a change are dropped, and the bounds are about the later ones."""
    broken = after_all(Bounds(limit(43_200, 8)), [(0, 32)] * 1000)
    assert broken.stretch_upper < 0.05
    assert after_all(broken, [(28, 32)] * 5).stretch_upper > 0.65
    well = after_all(broken, [(28, 32)] * 25)
    assert well.stretch_upper > 0.84
    assert well.lower > 0.7


def test_after_a_drop_the_interval_is_about_the_rounds_after_it() -> None:
    """0.90 to 0.60 after 100 rounds of 24 of 450 images: at no round is the interval wrong about its own mean, and
    twenty rounds later it holds 0.60 in all of 40 streams but four, though rounds before the drop may be among its own.
    (It does in 999 of 1,000, so that five of 40 fall out once in a million.) The former lower bound excluded 0.60."""
    truth = np.r_[np.full(100, 0.9), np.full(40, 0.6)]
    right = drawn(np.random.default_rng(0), truth, 40)
    found = now_judged(right, truth, 0.8)
    assert POOL * truth[-1] == 270
    assert not found.wrong.any()
    assert not found.inverted.any()
    assert found.outside[:, 119].sum() <= 4


@pytest.mark.parametrize(("before", "after"), [(22, 14), (22, 2), (14, 22), (7, 12)])
def test_bounds_follow_a_change(before: int, after: int) -> None:
    """So many of 24 right in each of 100 rounds and then others, a drop or a rise: twenty rounds later the interval
    holds the share of now; the former one excluded it."""
    bounds = after_all(Bounds(limit(43_200, 10)), [(before, 24)] * 100 + [(after, 24)] * 20)
    assert bounds.lower < after / 24 < bounds.upper
    assert bounds.rounds <= 23
