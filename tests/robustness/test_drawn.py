"""A dear suite on a drawn part: the bounds are about all images, and lie no more often than they say."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binom

from dfmcl.robustness.drawn import DrawnSequence, Fates, one_look_bounds
from dfmcl.robustness.records import AttackRecord, Evaluation
from dfmcl.robustness.sequential import ConfidenceSequence
from dfmcl.robustness.threats.linf import Linf

FLAGS = st.lists(st.tuples(st.booleans(), st.booleans(), st.booleans()), min_size=1, max_size=40)


def seen_of(rows: list[tuple[bool, bool, bool]]) -> Fates:
    held, drawn, falls = (np.array(column) for column in zip(*rows, strict=True))
    return Fates(held, drawn, held & drawn & falls)


def population(seed: int, images: int, held: float, lost: float, chance: float) -> tuple[Fates, float]:
    """Images in random order; so many hold under the cheap suite, and so many of these fall to the dear one;
    and the share that holds under both."""
    stream = np.random.default_rng(seed)
    ranks = stream.permutation(images)
    holds, falls = ranks < round(held * images), ranks < round(lost * images)
    drawn = stream.random(images) < chance
    return Fates(holds, drawn, holds & falls & drawn), float((holds & ~falls).mean())


@settings(max_examples=30)
@given(FLAGS, st.integers(0, 40))
def test_cuts_make_no_difference(rows: list[tuple[bool, bool, bool]], cut: int) -> None:
    """Outcomes may come in any parts; bounds never cross, and one image's bounds stand when others follow."""
    seen, begin = seen_of(rows), DrawnSequence.begin(60, 0.95)
    whole, parts = begin.after(seen), begin.after(seen[slice(cut)]).after(seen[slice(cut, None)])
    for one, other in ((whole.lower, parts.lower), (whole.upper, parts.upper)):
        np.testing.assert_array_equal(one, other)
    assert (whole.lower >= 0).all()
    assert len(whole.lower) == len(seen)


def test_where_all_are_drawn_at_the_end_the_share_is_known() -> None:
    """Every image met both suites: both bounds are what holds under both."""
    seen, share = population(3, 200, 0.6, 0.1, 1.0)
    found = DrawnSequence.begin(200, 0.95).after(seen)
    assert found.lower[-1] == found.upper[-1] == round(share * 200) == seen.kept.sum()


def test_what_was_not_drawn_is_not_believed() -> None:
    """Without a drawn image nothing is known of the dear suite: the lower bound is 0, whatever held."""
    seen = Fates.of(np.ones(50, bool))
    assert DrawnSequence.begin(50, 0.95).after(seen).lower[-1] == 0
    assert one_look_bounds(seen, 0.95, 0.95)[0] == 0.0


@pytest.mark.parametrize("lost", [0.0, 0.05, 0.45])
def test_at_its_share_a_model_passes_no_more_often_than_it_may(lost: float) -> None:
    """200 gates of 150 images at confidence 80 %: however many fall to the dear suite alone, the bounds are wrong
    within alpha, each way; a correct program fails with a chance below 1e-4 (exact binomial)."""
    wrong = np.zeros(2, int)
    for seed in range(200):
        seen, share = population(seed, 150, 0.5, lost, 0.3)
        found = DrawnSequence.begin(150, 0.8).after(seen)
        wrong += ((found.lower / 150 > share + 1e-9).any(), (found.upper / 150 < share - 1e-9).any())
    assert (wrong <= binom.isf(5e-5, 200, 0.2)).all(), wrong


def test_the_same_of_one_look() -> None:
    """2,000 draws from a population of 30 % that hold, 10 % lost: each bound errs within alpha."""
    stream, wrong = np.random.default_rng(0), np.zeros(2, int)
    for _ in range(2000):
        chance = stream.random((3, 150))
        held, drawn = chance[0] < 0.4, chance[1] < 0.3
        lower, upper = one_look_bounds(Fates(held, drawn, held & drawn & (chance[2] < 0.25)), 0.8, 0.8)
        wrong += (lower > 0.3, upper < 0.3)
    assert (wrong <= binom.isf(5e-5, 2000, 0.2)).all(), wrong


def test_a_drawn_fifth_is_worth_most_of_the_bound() -> None:
    """1,000 images at 45 %, none lost: the lower bound is at most 4 points below that of all images under both."""
    seen, _ = population(1, 1000, 0.45, 0.0, 0.2)
    all_of_them = ConfidenceSequence(10_000, 0.95).after(seen.held).lower[-1] / 10_000
    drawn = DrawnSequence.begin(10_000, 0.95).after(seen).lower[-1] / 10_000
    assert all_of_them - 0.04 < drawn < all_of_them


def test_a_record_says_who_met_what() -> None:
    """The last attacks are those that only drawn images met; who fell before them is not lost to them."""
    correct = (True, True, True, False)
    cheap = AttackRecord("cr", {}, (True, True, False, False), correct, 0, 1.0)
    dear = AttackRecord("square", {}, (True, False, False, False), (False, True, False, False), 0, 1.0)
    record = Evaluation(Linf(0.1), True, 0, correct, (cheap, dear), 1.0)
    drawn = np.array([False, True, True, True])
    seen = Fates.by(record, drawn, 1)
    assert seen.held.tolist() == [True, True, False, False]
    assert seen.lost.tolist() == [False, True, False, False]
    assert seen.kept.tolist() == [True, False, False, False]
    assert Fates.by(record, drawn, 0).kept.tolist() == seen.kept.tolist()
