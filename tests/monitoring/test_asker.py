"""The frame around requests: pace, pause, slowness, one version, and nothing that is not believable."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import pytest

from dfmcl.common.errors import AnswerError, BadInput, DeadlineExceeded, DfmclError, Rejected, Unavailable
from dfmcl.monitoring.asker import KNOWN, QUERY_IMAGES, REMEMBERED, SLOW_FLOOR_SECONDS, Asker, Latencies, Paused
from dfmcl.monitoring.results import REASONS
from dfmcl.serving.clients.triton import Answer
from tests.monitoring.clocks import Still
from tests.monitoring.greys import failed, manners, one_round, plan, served

IMAGES = np.zeros((10, 4, 4, 3), np.uint8)
THRICE = np.zeros((3 * QUERY_IMAGES, 4, 4, 3), np.uint8)  # in three requests of one size


class Slow:
    """A server that takes as long as a test says, by its clock."""

    def __init__(self, clock: Still, seconds: Iterator[float]) -> None:
        self.clock, self.seconds = clock, seconds

    def __call__(self, images: np.ndarray) -> Answer:
        self.clock.now += next(self.seconds)
        return served(images)


def test_requests_are_small_and_counted() -> None:
    """Ten images go in requests of at most 4, each recorded with its time; none at all go in no request."""
    clock = Still()
    endpoint = Asker(2, clock, manners())
    assert endpoint.through(Slow(clock, iter([1.0, 2.0, 3.0])))(IMAGES).shape == (10, 2)
    assert [(query.images, query.seconds, query.reason) for query in endpoint.queries] == [
        (4, 1.0, ""),
        (4, 2.0, ""),
        (2, 3.0, ""),
    ]
    assert QUERY_IMAGES == 4
    assert endpoint.through(served)(IMAGES[:0]).shape == (0, 2)
    assert len(endpoint.queries) == 3


@pytest.mark.parametrize("duty", [1.0, 0.5, 0.1])
def test_requests_are_under_way_for_the_share_that_is_allowed(duty: float) -> None:
    """After each answer it rests so long that asking takes `duty` of the time; before the first it does not."""
    clock, rests = Still(), list[float]()
    taken = [0.2, 0.4, 0.1]
    endpoint = Asker(2, clock, manners(wait=rests.append, duty=duty))
    endpoint.through(Slow(clock, iter(taken)))(IMAGES)
    assert rests[0] == 0
    assert rests[1:] == pytest.approx([seconds * (1 - duty) / duty for seconds in taken[:-1]])


def test_the_kill_switch_is_looked_at_before_each_request() -> None:
    """One that is thrown after the first answer lets no second request go."""
    answers = iter([False, True])
    endpoint = Asker(2, Still(), manners(paused=lambda: next(answers)))
    with pytest.raises(Paused):
        endpoint.through(served)(IMAGES)
    assert len(endpoint.queries) == 1


def test_two_slow_answers_in_a_row_end_a_round() -> None:
    """Slow is so many times what is usual for requests of this size; one alone may be a hiccup."""
    latencies = Latencies(5.0)
    usual = [0.1] * KNOWN
    assert not any(latencies.is_slow(4, seconds) for seconds in usual)
    clock = Still()
    endpoint = Asker(2, clock, manners(latencies=latencies))
    endpoint.through(Slow(clock, iter([0.6, 0.1, 0.6])))(THRICE)
    with pytest.raises(Unavailable, match="2 answers in a row took far longer than usual") as caught:
        endpoint.through(Slow(clock, iter([0.6, 0.6])))(IMAGES)
    assert caught.value.reason == "slow"


def test_after_giving_way_once_a_slower_model_is_measured() -> None:
    """A model that was replaced may be slower for good: its next round must be looked at, not given way to again."""
    latencies = Latencies(5.0)
    assert not any(latencies.is_slow(4, seconds) for seconds in [0.1] * KNOWN)
    clock = Still()
    with pytest.raises(Unavailable):
        Asker(2, clock, manners(latencies=latencies)).through(Slow(clock, iter([0.6, 0.6])))(IMAGES)
    slower = Asker(2, clock, manners(latencies=latencies)).through(Slow(clock, iter([0.6] * 3)))
    assert len(slower(THRICE)) == len(THRICE)


def test_slow_is_said_for_each_size_and_never_early() -> None:
    """Fewer than eight known answers of a size say nothing, nor does anything below a tenth of a second."""
    latencies = Latencies(5.0)
    assert not any(latencies.is_slow(1, seconds) for seconds in [0.001] * KNOWN)
    assert not latencies.is_slow(1, SLOW_FLOOR_SECONDS)
    assert latencies.is_slow(1, SLOW_FLOOR_SECONDS + 0.001)
    assert not latencies.is_slow(4, 3.0)


def test_a_server_that_stays_slower_is_usual_in_the_end() -> None:
    """After as many slow answers as are remembered at most, and no further growth."""
    latencies = Latencies(5.0)
    for _ in range(REMEMBERED):
        latencies.is_slow(4, 0.1)
    slow = [latencies.is_slow(4, 1.0) for _ in range(REMEMBERED)]
    assert slow[0]
    assert not slow[-1]
    assert len(latencies.seen[4]) == REMEMBERED


FAILURES: dict[str, tuple[DfmclError, str]] = {
    "no connection": (Unavailable("gone", "unavailable"), "unavailable"),
    "queue full": (Unavailable("full", "queue_full"), "queue_full"),
    "server failed": (Unavailable("oops", "internal"), "server_error"),
    "deadline": (DeadlineExceeded("late", "timeout"), "timeout"),
    "refused": (Rejected("no", "invalid"), "rejected"),
    "no such model": (Rejected("who", "unknown_model"), "rejected"),
    "nonsense": (Rejected("nan", "bad_output"), "bad_output"),
    "version changed inside a request": (Rejected("2", "version_changed"), "version_changed"),
    "other images": (BadInput("takes (8, 8, 3)"), "rejected"),
    "a reason from the future": (AnswerError("?", "novel"), "internal"),
    "another error of the client": (DfmclError("?"), "internal"),
}


@pytest.mark.parametrize(("error", "reason"), FAILURES.values(), ids=FAILURES)
@pytest.mark.parametrize("spared", range(7))
def test_every_failure_has_a_reason_and_nothing_is_retried(error: DfmclError, reason: str, spared: int) -> None:
    """Whichever query fails, the round is a counted failure without figures, and no query follows."""
    calls = 0

    def predict(images: np.ndarray) -> Answer:
        nonlocal calls
        calls += 1
        if calls > spared:
            raise error
        return served(images)

    failure = failed(one_round(plan(("fgsm", "pgd-3")), predict))
    assert failure.reason == reason
    assert failure.reason in REASONS
    assert [query.reason for query in failure.queries] == [""] * spared + [reason]
    assert calls == spared + 1


def test_what_is_no_answer_at_all_is_no_answered_query() -> None:
    """An error of ours while asking is counted as such before it goes on."""

    def predict(images: np.ndarray) -> Answer:
        raise ZeroDivisionError

    endpoint = Asker(2, Still(), manners())
    with pytest.raises(ZeroDivisionError):
        endpoint.through(predict)(IMAGES)
    assert [query.reason for query in endpoint.queries] == ["internal"]


def logits(rows: Callable[[int], np.ndarray], version: str = "1") -> Callable[[np.ndarray], Answer]:
    return lambda images: Answer(rows(len(images)), version)


NONSENSE = {
    "too few rows": logits(lambda n: np.zeros((n - 1, 2), np.float32)),
    "too many classes": logits(lambda n: np.zeros((n, 3), np.float32)),
    "not a number": logits(lambda n: np.full((n, 2), np.nan, np.float32)),
    "infinite": logits(lambda n: np.full((n, 2), np.inf, np.float32)),
    "version that is no number": logits(lambda n: np.zeros((n, 2), np.float32), "<b>1</b>"),
    "version of other digits": logits(lambda n: np.zeros((n, 2), np.float32), "\u0663"),
    "version that is too long": logits(lambda n: np.zeros((n, 2), np.float32), "1" * 20),
    "no version": logits(lambda n: np.zeros((n, 2), np.float32), ""),
}


@pytest.mark.parametrize("predict", NONSENSE.values(), ids=NONSENSE)
def test_nonsense_is_not_believed(predict: Callable[[np.ndarray], Answer]) -> None:
    """An answer that cannot be logits of this model, or whose version cannot be a label, fails the round."""
    assert failed(one_round(predict=predict)).reason == "bad_output"


@pytest.mark.parametrize("changed", range(1, 7))
def test_a_round_with_two_versions_is_thrown_away(changed: int) -> None:
    """Where the version changes between queries no figure belongs to either; the queries themselves were answered."""
    versions = iter(["1"] * changed + ["2"])
    failure = failed(one_round(plan(("fgsm", "pgd-3")), lambda x: served(x, next(versions))))
    assert failure.reason == "version_changed"
    assert [query.reason for query in failure.queries] == [""] * (changed + 1)
