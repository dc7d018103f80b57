"""Bounds that may be looked at after every round: what they claim, simulated where a breach would be seen."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from monitoring.bounds import ENOUGH, GRID, RATIOS, Bounds, after_all, limit

RISK, ROUNDS, RUNS, IMAGES = 0.2, 200, 200, 16
# Where exactly RISK of all runs were wrong, one sample in 40 would have more than this; the seeds are fixed, and the
# bounds err on the safe side by far more.
TOLERATED = RISK + 2 * math.sqrt(RISK * (1 - RISK) / RUNS)
STEP = 0.05  # of the grid that is simulated
rounds = st.lists(st.integers(1, 24).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))), max_size=20)


def stake(p: float, ratio: float, outcomes: list[tuple[int, int]]) -> float:
    """What one bet makes of 1: the likelihood ratio of every image on its own."""
    odds = ratio * p / (1 - p)
    believed = odds / (1 + odds)
    own = 1.0
    for right, images in outcomes:
        for image in range(images):
            own *= believed / p if image < right else (1 - believed) / (1 - p)
    return own


def test_a_stake_is_a_likelihood_ratio() -> None:
    """Against the product over images, for every bet and some accuracies; each round adds a stake of its own."""
    outcomes = [(3, 8), (5, 8), (0, 4)]
    owned = after_all(Bounds.none(1e6), outcomes).below
    for place in (100, 250, 400):
        for column, ratio in enumerate(RATIOS):
            expected = sum(stake(GRID[place], ratio, outcomes[begin:]) for begin in range(len(outcomes)))
            assert math.exp(owned[place, column]) == pytest.approx(expected)


def test_a_bet_is_fair() -> None:
    """Under the accuracy that is tested a stake is worth 1 on average, and less where the accuracy is higher."""
    images = 6
    for p, truth, fair in ((0.4, 0.4, True), (0.4, 0.7, False)):
        chance = [math.comb(images, k) * truth**k * (1 - truth) ** (images - k) for k in range(images + 1)]
        for ratio in RATIOS:
            mean = sum(c * stake(p, ratio, [(k, images)]) for k, c in enumerate(chance))
            assert mean == pytest.approx(1) if fair else mean < 1


@given(rounds)
def test_the_bounds_keep_order(outcomes: list[tuple[int, int]]) -> None:
    """Inside [0, 1], on the grid; what rejects an accuracy rejects all above it."""
    bounds = after_all(Bounds.none(50.0), outcomes)
    assert 0 <= bounds.lower <= 1
    assert 0 <= bounds.upper <= 1
    won = np.logaddexp.reduce(bounds.below, axis=1)
    assert (np.diff(won[np.isfinite(won)]) >= -1e-9).all()


@given(rounds)
def test_lower_is_upper_of_the_failures(outcomes: list[tuple[int, int]]) -> None:
    """Right and wrong are treated alike."""
    bounds = after_all(Bounds.none(50.0), outcomes)
    mirrored = after_all(Bounds.none(50.0), [(n - k, n) for k, n in outcomes])
    assert bounds.lower == pytest.approx(1 - mirrored.upper)


@given(rounds, st.integers(0, 23))
def test_one_more_right_answer_never_lowers_a_bound(outcomes: list[tuple[int, int]], place: int) -> None:
    """Neither bound goes down where an image that was wrong is right."""
    wrong = [i for i, (k, n) in enumerate(outcomes) if k < n]
    if not wrong:
        return
    better = list(outcomes)
    k, n = better[wrong[place % len(wrong)]]
    better[wrong[place % len(wrong)]] = k + 1, n
    old, new = after_all(Bounds.none(20.0), outcomes), after_all(Bounds.none(20.0), better)
    assert new.upper >= old.upper
    assert new.lower >= old.lower


def test_nothing_proves_nothing() -> None:
    """Before the first round, and after rounds without images, every accuracy is possible."""
    bounds = Bounds.none(10.0)
    assert (bounds.lower, bounds.upper) == (0.0, 1.0)
    assert bounds.after(0, 0) is bounds


def test_the_limit_is_looks_and_bounds_over_risk() -> None:
    """A month of a round a minute, two bounds, 1 %; less than one round counts as one."""
    assert limit(43_200, 2, 0.01) == pytest.approx(8_640_000)
    assert limit(0.1, 2, 0.01) == 200


def simulated(
    truth: np.ndarray, *, pool: int = 0, risk: float = RISK, stakes: bool = True, runs: int = RUNS
) -> tuple[np.ndarray, np.ndarray]:
    """Upper and lower bounds after each round, `(runs, rounds)`, of runs whose accuracy in round t is truth[t].

    pool: images there are to draw a round from, without replacement; 0 for endlessly many. It is the formula of
    bounds.py over many runs at once; `test_the_simulation_is_the_code` holds the two together.
    """
    rng = np.random.default_rng(0)
    if pool:
        right = np.stack([rng.hypergeometric(round(p * pool), pool - round(p * pool), IMAGES, runs) for p in truth], 1)
    else:
        right = rng.binomial(IMAGES, truth, (runs, len(truth)))
    enough = math.log(limit(len(truth), 1, risk))
    grid = GRID[::25]
    shrunk = np.log1p(-grid[:, None] * (1 - RATIOS))
    most = enough + math.log(len(RATIOS) * ENOUGH)
    found = []
    for successes in (right, IMAGES - right):
        owned, bounds = np.full((runs, len(grid), len(RATIOS)), -np.inf), []
        for t in range(len(truth)):
            fresh = 0.0 if stakes or t == 0 else -np.inf
            bet = successes[:, t, None, None] * np.log(RATIOS) - IMAGES * shrunk
            owned = np.minimum(np.logaddexp(owned, fresh) + bet, most)
            won = np.logaddexp.reduce(owned, axis=2) - math.log(len(RATIOS))
            rejected = won >= enough
            bounds.append(np.where(rejected.any(axis=1), grid[rejected.argmax(axis=1)], 1.0))
        found.append(np.stack(bounds, axis=1))
    return found[0], 1 - found[1]


def test_the_simulation_is_the_code() -> None:
    """The formula of the simulations below gives what Bounds gives, on its coarser grid."""
    truth = np.full(40, 0.4)
    upper, lower = simulated(truth)
    right = np.random.default_rng(0).binomial(IMAGES, truth, (RUNS, len(truth)))
    for run in range(5):
        bounds = after_all(Bounds.none(limit(40, 1, RISK)), [(int(k), IMAGES) for k in right[run]])
        assert -1e-9 <= upper[run, -1] - bounds.upper < STEP
        assert -1e-9 <= bounds.lower - lower[run, -1] < STEP


@pytest.mark.parametrize("pool", [0, 20], ids=["endless pool", "small pool"])
@pytest.mark.parametrize("accuracy", [0.1, 0.5, 0.9])
def test_false_bounds_are_as_rare_as_is_claimed(accuracy: float, pool: int) -> None:
    """Looked at after every round, in at most RISK of the runs either bound is ever wrong: also where a round takes
    most of a small pool."""
    upper, lower = simulated(np.full(ROUNDS, accuracy), pool=pool)
    assert (upper < accuracy - 1e-9).any(axis=1).mean() <= TOLERATED
    assert (lower > accuracy + 1e-9).any(axis=1).mean() <= TOLERATED


def test_a_limit_too_low_is_caught() -> None:
    """The test above can fail: with the limit of one look, too many runs are wrong."""
    upper, _ = simulated(np.full(ROUNDS, 0.5), risk=ROUNDS * RISK)
    assert (upper < 0.5 - 1e-9).any(axis=1).mean() > TOLERATED


def rounds_until(found: np.ndarray) -> float:
    """How many rounds it took on average until it held; it must come true in each run."""
    assert found.any(axis=1).all()
    return float(found.argmax(axis=1).mean())


def test_a_late_change_is_seen_as_quickly_as_an_early_one() -> None:
    """A fall from 0.8 to 0.4 is proven about as soon after 150 good rounds as after none; without a new stake a round
    it would take far longer, which is what the stakes are for."""
    late, early = np.r_[np.full(150, 0.8), np.full(100, 0.4)], np.r_[np.full(100, 0.4), np.full(150, 0.4)]
    after = rounds_until(simulated(late, runs=50)[0][:, 150:] < 0.7)
    before = rounds_until(simulated(early, runs=50)[0] < 0.7)
    assert after < 1.5 * before < 20
    lonely, _ = simulated(late, stakes=False, runs=50)
    assert not (lonely[:, 150:] < 0.7).any(axis=1).all() or rounds_until(lonely[:, 150:] < 0.7) > 2 * after


def test_recovery_does_not_take_as_long_as_the_loss() -> None:
    """After 1,000 rounds in which nothing was right, five in which 28 of 32 were free any threshold up to 65 %: what
    is won is capped. Until then the bound speaks of the outage."""
    broken = after_all(Bounds.none(limit(43_200, 8)), [(0, 32)] * 1000)
    assert broken.upper < 0.05
    assert after_all(broken, [(28, 32)] * 5).upper > 0.65
    assert after_all(broken, [(28, 32)] * 25).upper > 0.84
