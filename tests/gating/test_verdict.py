"""Verdicts: bounds decide, better figures never lead to a worse one, and many claims do not make errors likelier."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dfmcl.common.errors import BadInput
from dfmcl.gating.criterion import Criterion
from dfmcl.gating.verdict import EXIT_CODES, Claim, Judgement, Standing, claims, decide, one_look
from dfmcl.robustness.drawn import Fates
from dfmcl.robustness.sequential import ConfidenceSequence
from dfmcl.robustness.statistics import lower_bound, upper_bound

CLASSES = ("cat", "dog", "ship")
counts = st.integers(1, 300).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n)))
thresholds = st.floats(0, 1)
RANK = {"failed": 0, "inconclusive": 1, "passed": 2}


def robust(threshold: float, confidence: float = 0.95) -> Criterion:
    return Criterion("robust_accuracy", threshold, confidence)


def flags(k: int, n: int) -> np.ndarray:
    return np.arange(n) < k


def looked(criterion: Criterion, k: int, n: int, among: int = 1) -> Judgement:
    return one_look(Claim(criterion, 10_000), Fates.of(flags(k, n)), among)


@given(counts, thresholds, st.floats(0.5, 0.999))
def test_one_look_is_monotone(count: tuple[int, int], threshold: float, confidence: float) -> None:
    """One more surviving image, or a lower threshold, never makes a verdict worse."""
    k, n = count
    verdict = decide([looked(robust(threshold, confidence), k, n).outcome], [])
    better = decide([looked(robust(threshold, confidence), min(k + 1, n), n).outcome], [])
    easier = decide([looked(robust(threshold / 2, confidence), k, n).outcome], [])
    assert RANK[verdict] <= RANK[better]
    assert RANK[verdict] <= RANK[easier]


@given(counts, thresholds, st.integers(1, 20))
def test_a_point_estimate_never_decides(count: tuple[int, int], threshold: float, among: int) -> None:
    """Met means that the lower bound reaches the threshold, missed that the upper one, corrected, does not."""
    judgement = looked(robust(threshold), *count, among)
    assert judgement.lower == lower_bound(*count, 0.95)
    assert judgement.upper == upper_bound(*count, 1 - 0.05 / among)
    assert (judgement.outcome == "met") == (judgement.lower >= threshold)
    assert (judgement.outcome == "missed") == (judgement.lower < threshold and judgement.upper < threshold)


def test_ten_claims_fail_a_good_model_no_more_often_than_one() -> None:
    """Each of ten shares is exactly at its threshold: the model fails in at most 5 % of the runs, not in 30 %."""
    stream, runs = np.random.default_rng(0), 1000
    failed = {10: 0, 1: 0}
    for among in failed:
        for _ in range(runs):
            seen = [Fates.of(stream.random(200) < 0.5) for _ in range(10)]
            judged = [one_look(Claim(robust(0.5), 10**9), one, among) for one in seen]
            failed[among] += "missed" in [judgement.outcome for judgement in judged]
    assert failed[10] / runs <= 0.05 + 3 * np.sqrt(0.05 * 0.95 / runs)
    assert failed[1] / runs > 0.2


def test_to_pass_no_correction_is_needed_to_fail_one_is() -> None:
    """Of ten claims each lower bound keeps its confidence, as all must be met; each upper one gives a tenth."""
    standing = Standing.begin(Claim(robust(0.5, 0.9), 100), 10)
    assert isinstance(standing.lower, ConfidenceSequence)
    assert isinstance(standing.upper, ConfidenceSequence)
    assert (standing.lower.confidence, standing.upper.confidence) == pytest.approx((0.9, 0.99))


def test_a_standing_decides_once() -> None:
    """The first bound to reach the threshold decides; what comes after it changes counts, not the outcome."""
    standing = Standing.begin(Claim(robust(0.3), 1000), 1).after(Fates.of(np.ones(30, bool)))
    early = standing.judgement
    assert (early.outcome, early.share.k) == ("met", 30)
    assert early.decided_after is not None
    assert early.decided_after < 30
    late = standing.after(Fates.of(np.zeros(900, bool))).judgement
    assert (late.outcome, late.decided_after) == ("met", early.decided_after)
    assert Standing.begin(Claim(robust(0.3), 1000), 1).judgement.outcome == "open"


@settings(max_examples=15, deadline=None)  # each look at a bound is a search
@given(st.lists(st.booleans(), min_size=1, max_size=60), st.integers(5, 30))
def test_blocks_do_not_matter(outcomes: list[bool], size: int) -> None:
    """A standing after all images is the same, in whichever blocks they came."""
    whole = Standing.begin(Claim(robust(0.5), 60), 3).after(Fates.of(np.array(outcomes)))
    parts = Standing.begin(Claim(robust(0.5), 60), 3)
    for begin in range(0, len(outcomes), size):
        parts = parts.after(Fates.of(np.array(outcomes[begin : begin + size])))
    assert whole.judgement == parts.judgement


def test_each_class_is_a_claim_of_its_own() -> None:
    """A floor for classes is one claim a class, about as many images as it has."""
    labels = np.array([0, 0, 1, 0, 2])
    floor, overall = Criterion("class_robust_accuracy", 0.2, 0.95), robust(0.4)
    found = claims([overall, floor], CLASSES, labels)
    assert [(str(claim), claim.population) for claim in found] == [
        ("robust_accuracy >= 0.4 at 95 %", 5),
        ("class_robust_accuracy >= 0.2 at 95 %, class cat", 3),
        ("class_robust_accuracy >= 0.2 at 95 %, class dog", 1),
        ("class_robust_accuracy >= 0.2 at 95 %, class ship", 1),
    ]


@pytest.mark.parametrize("metric", ["class_robust_accuracy", "class_clean_accuracy"])
def test_a_class_without_images_is_bad_input(metric: str) -> None:
    """What cannot be tested is not met: the class is named, and nothing is left out in silence."""
    floor = Criterion(metric, 0.2, 0.95)
    with pytest.raises(
        BadInput, match=rf"criterion '{metric} >= 0\.2 at 95 %': the test part has no image of class dog;"
    ):
        claims([robust(0.4), floor], CLASSES, np.array([0, 0, 2]))
    with pytest.raises(BadInput, match="no image of class dog, ship; add images"):
        claims([floor], CLASSES, np.array([0, 0]))
    many = tuple(str(number) for number in range(1000))
    with pytest.raises(BadInput, match="class 1, 2, 3, 4, 5, 6, 7, 8, 9, 10 and 989 more") as caught:
        claims([floor], many, np.array([0]))
    assert len(str(caught.value)) < 300
    assert len(claims([robust(0.4)], CLASSES, np.array([0, 0]))) == 1  # nothing was asked about classes


def test_precedence() -> None:
    """Failed before suspect before inconclusive before passed, and the exit codes are the documented ones."""
    finding = ["x"]
    assert decide(["met", "missed", "open"], finding, ["no_gradients"]) == "failed"
    assert decide(["met", "open"], finding) == "suspect"
    assert decide(["met", "open"], []) == "inconclusive"
    assert decide(["met"], [], ["no_gradients"]) == "inconclusive"
    assert decide(["met", "open"], finding, ["not_finite"]) == "failed"
    assert decide(["met"], []) == "passed"
    assert EXIT_CODES == {"passed": 0, "failed": 1, "inconclusive": 3, "suspect": 4}
