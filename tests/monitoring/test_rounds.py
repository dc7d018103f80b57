"""One round against outcomes counted by hand, and every way in which an endpoint can spoil it."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from monitoring import probes
from monitoring.probes import Scene, craft, transfer_attack
from monitoring.rounds import (
    QUERY_IMAGES,
    REASONS,
    AttackResult,
    Plan,
    Query,
    Round,
    RoundFailure,
    RoundResult,
    draw,
    round_from_json,
    run_round,
)
from robustness.attacks import Attack
from robustness.errors import BadInput
from robustness.threat import Threat
from serving.client import Answer
from serving.errors import AnswerError, DeadlineExceeded, Rejected, ServingError, Unavailable
from serving.errors import BadInput as Misfit

GREYS = np.array([10, 100, 110, 120, 135, 145, 155, 250], np.uint8)
LABELS = np.array([0, 0, 0, 0, 1, 1, 1, 0], np.int64)  # the last one is wrong: bright is class 1
EPS = 20  # flips greys within 20 of 127.5: 110, 120, 135, 145


class Clock:
    """A clock that counts a second a look."""

    def __init__(self) -> None:
        self.now = 0.0

    def time(self) -> float:
        return 1000.0 + self.monotonic()

    def monotonic(self) -> float:
        self.now += 1.0
        return self.now


def brightness(x: torch.Tensor) -> torch.Tensor:
    """Logits of a linear model: class 1 where the mean is above one half."""
    mean = x.flatten(1).mean(dim=1)
    return torch.stack([0.5 - mean, mean - 0.5], dim=1)


def served(images: np.ndarray, version: str = "1") -> Answer:
    """The same model behind the endpoint."""
    return Answer(brightness(torch.from_numpy(images).float().permute(0, 3, 1, 2) / 255).numpy(), version)


def plan(greys: np.ndarray = GREYS, labels: np.ndarray = LABELS, attacks: tuple[str, ...] = ("fgsm",)) -> Plan:
    images = np.broadcast_to(greys[:, None, None, None], (len(greys), 4, 4, 3)).copy()
    return Plan(
        model="bright",
        images=images,
        labels=labels,
        classes=2,
        source=brightness,
        threat=Threat("linf", EPS / 255),
        attacks=tuple(transfer_attack(name) for name in attacks),
        images_per_round=len(greys),
        seed=0,
    )


def measured(outcome: Round) -> RoundResult:
    assert isinstance(outcome, RoundResult), outcome
    return outcome


def failed(outcome: Round) -> RoundFailure:
    assert isinstance(outcome, RoundFailure), outcome
    return outcome


@pytest.mark.parametrize(
    "attack", ["fgsm", "pgd-10", "mi-fgsm-10", "di-fgsm-10", "ti-fgsm-10", "vmi-fgsm-3", "margin-pgd-10"]
)
def test_figures_equal_those_counted_by_hand(attack: str) -> None:
    """Of eight grey images one is wrong already and four lie within eps of the border."""
    result = measured(run_round(plan(attacks=(attack,)), 1, predict=served, clock=Clock()))
    chosen = draw(8, 8, 0, 1)
    assert result.correct == tuple(GREYS[chosen] != 250)
    assert result.attacks[0].held == tuple(np.isin(GREYS[chosen], [10, 100, 155]))
    assert (result.clean.k, result.under(result.attacks[0]).k, result.worst_case.k) == (7, 3, 3)
    assert result.version == "1"
    assert result.epsilon == "20/255"


def test_worst_case_is_per_image() -> None:
    """Two attacks that flip different images leave only the images that neither flips."""
    result = RoundResult(
        *(1, "m", "1", "linf", "8/255", 0.0, 1.0),
        correct=(True, True, True, False),
        attacks=(
            AttackResult("fgsm", (True, False, True, False)),
            AttackResult("pgd-10", (False, True, True, False)),
        ),
        queries=(),
    )
    assert [result.under(attack).k for attack in result.attacks] == [2, 2]
    assert result.worst_case.k == 1


def test_the_log_line_says_what_was_found() -> None:
    """Model, version, size, clean and attacked accuracy with bounds, and the time, on one line."""
    result = measured(run_round(plan(), 12, predict=served, clock=Clock()))
    assert str(result) == (
        "round 12: model bright v1, 8 images, clean 87.5 %, transfer fgsm at 20/255 37.5 % [8.5, 75.5], "
        f"worst case 37.5 % [8.5, 75.5], {result.seconds:.1f} s"
    )


def test_clean_comes_first_and_each_image_is_sent_once_an_attack() -> None:
    """Clean images, then one version an attack of those that were right, none twice, all inside the ball."""
    sent: list[np.ndarray] = []

    def predict(images: np.ndarray) -> Answer:
        sent.append(images)
        return served(images)

    settings = plan(attacks=("fgsm", "pgd-3"))
    run_round(settings, 1, predict=predict, clock=Clock())
    clean = settings.images[draw(8, 8, 0, 1)]
    right = clean[clean[:, 0, 0, 0] != 250]
    assert np.array_equal(sent[0], clean)
    assert [len(images) for images in sent] == [8, 7, 7]
    for adversarial in sent[1:]:
        distance = np.abs(adversarial.astype(int) - right)
        assert distance.max() == EPS


def test_queries_are_bounded_and_counted() -> None:
    """A round of 70 images asks in requests of at most 32, and records each with its time."""
    settings = plan(np.full(70, 10, np.uint8), np.zeros(70, np.int64))
    result = measured(run_round(settings, 1, predict=served, clock=Clock()))
    assert [query.images for query in result.queries] == [32, 32, 6, 32, 32, 6]
    assert {query.seconds for query in result.queries} == {1.0}
    assert QUERY_IMAGES == 32


def test_a_round_in_which_every_clean_image_is_wrong_has_nothing_to_attack() -> None:
    """Accuracy is 0 of n, and no adversarial image is sent."""
    settings = plan(labels=(GREYS < 128).astype(np.int64))  # every label is the other one
    result = measured(run_round(settings, 1, predict=served, clock=Clock()))
    assert result.clean.k == 0
    assert result.worst_case.k == 0
    assert sum(query.images for query in result.queries) == 8


FAILURES: dict[str, tuple[ServingError, str]] = {
    "no connection": (Unavailable("gone", "unavailable"), "unavailable"),
    "queue full": (Unavailable("full", "queue_full"), "queue_full"),
    "server failed": (Unavailable("oops", "internal"), "internal"),
    "deadline": (DeadlineExceeded("late", "timeout"), "timeout"),
    "refused": (Rejected("no", "invalid"), "rejected"),
    "no such model": (Rejected("who", "unknown_model"), "rejected"),
    "nonsense": (Rejected("nan", "bad_output"), "bad_output"),
    "version changed inside a request": (Rejected("2", "version_changed"), "version_changed"),
    "other images": (Misfit("takes (8, 8, 3)"), "rejected"),
    "a reason from the future": (AnswerError("?", "novel"), "internal"),
    "another error of the client": (ServingError("?"), "internal"),
}


@pytest.mark.parametrize(("error", "reason"), FAILURES.values(), ids=FAILURES)
@pytest.mark.parametrize("spared", [0, 1, 2])
def test_every_failure_has_a_reason_and_nothing_is_retried(error: ServingError, reason: str, spared: int) -> None:
    """Whichever query fails, the round is a counted failure without figures, and no query follows."""
    calls = 0

    def predict(images: np.ndarray) -> Answer:
        nonlocal calls
        calls += 1
        if calls > spared:
            raise error
        return served(images)

    failure = failed(run_round(plan(attacks=("fgsm", "pgd-3")), 1, predict=predict, clock=Clock()))
    assert failure.reason == reason
    assert failure.reason in REASONS
    assert [query.reason for query in failure.queries] == [""] * spared + [reason]
    assert calls == spared + 1


def logits(rows: Callable[[int], np.ndarray], version: str = "1") -> Callable[[np.ndarray], Answer]:
    return lambda images: Answer(rows(len(images)), version)


NONSENSE = {
    "too few rows": logits(lambda n: np.zeros((n - 1, 2), np.float32)),
    "too many classes": logits(lambda n: np.zeros((n, 3), np.float32)),
    "not a number": logits(lambda n: np.full((n, 2), np.nan, np.float32)),
    "infinite": logits(lambda n: np.full((n, 2), np.inf, np.float32)),
    "version that is no number": logits(lambda n: np.zeros((n, 2), np.float32), "<b>1</b>"),
    "version that is too long": logits(lambda n: np.zeros((n, 2), np.float32), "1" * 20),
    "no version": logits(lambda n: np.zeros((n, 2), np.float32), ""),
}


@pytest.mark.parametrize("predict", NONSENSE.values(), ids=NONSENSE)
def test_nonsense_is_not_believed(predict: Callable[[np.ndarray], Answer]) -> None:
    """An answer that cannot be logits of this model, or whose version cannot be a label, fails the round."""
    assert failed(run_round(plan(), 1, predict=predict, clock=Clock())).reason == "bad_output"


def test_a_round_with_two_versions_is_thrown_away() -> None:
    """Where the version changes between queries no figure belongs to either; the queries themselves were answered."""
    versions = iter(["1", "1", "2"])
    settings = plan(attacks=("fgsm", "pgd-3"))
    failure = failed(run_round(settings, 1, predict=lambda x: served(x, next(versions)), clock=Clock()))
    assert failure.reason == "version_changed"
    assert [query.reason for query in failure.queries] == ["", "", ""]


def test_an_attack_that_leaves_the_ball_gains_nothing() -> None:
    """Images that an attack leaves outside the L2 ball are sent as they were."""

    def rogue(model, x, y, threat, *, generator, trial):
        return torch.where(torch.arange(len(x)).view(-1, 1, 1, 1) == 0, 1 - x, (x + 0.01).clamp(0, 1))

    images = plan().images
    scene = Scene(images, LABELS, brightness, Threat("l2", 0.5), 0, 1)
    crafted = craft(scene, Attack("rogue", rogue))
    assert np.array_equal(crafted[0], images[0])
    assert (crafted[1:] != images[1:]).any(axis=(1, 2, 3)).all()


def test_crafting_in_chunks_reaches_every_image(monkeypatch: pytest.MonkeyPatch) -> None:
    """An image is attacked wherever its chunk ends."""
    monkeypatch.setattr(probes, "CRAFT_IMAGES", 3)
    settings = plan()
    scene = Scene(settings.images, settings.labels, brightness, settings.threat, 0, 1)
    distance = np.abs(craft(scene, transfer_attack("fgsm")).astype(int) - settings.images).max(axis=(1, 2, 3))
    assert distance.tolist() == [EPS] * 7 + [5]  # 250 is pushed on to 255, where the box ends


def test_transfer_keeps_the_last_iterate() -> None:
    """An attack that stops at the border of the surrogate would say little about the target."""
    assert transfer_attack("pgd-7").parameters == {"steps": 7, "keep": "last"}
    for name in ("mi-fgsm", "di-fgsm", "ti-fgsm", "vmi-fgsm"):
        assert transfer_attack(name).parameters == {"steps": 10, "keep": "last"}


def test_rounds_repeat_by_seed_and_differ_by_number() -> None:
    """The same seed and number send the same bytes; another number or seed sends others."""

    def sent(settings: Plan, number: int) -> bytes:
        seen: list[bytes] = []
        run_round(settings, number, predict=lambda x: (seen.append(x.tobytes()), served(x))[1], clock=Clock())
        return b"".join(seen)

    settings = plan(np.arange(0, 80, dtype=np.uint8), np.zeros(80, np.int64), ("pgd-3",))
    settings = replace(settings, images_per_round=16)
    assert sent(settings, 1) == sent(settings, 1)
    assert sent(settings, 1) != sent(settings, 2)
    assert sent(settings, 1) != sent(replace(settings, seed=1), 1)


def test_an_image_that_returns_is_attacked_anew() -> None:
    """The attack's randomness belongs to the round, not to the image: another round starts from another point."""

    def rugged(x: torch.Tensor) -> torch.Tensor:
        return brightness(torch.sin(60 * x))

    settings = plan()
    scenes = [Scene(settings.images, settings.labels, rugged, settings.threat, 0, number) for number in (1, 1, 2)]
    first, again, other = (craft(scene, transfer_attack("pgd-3")) for scene in scenes)
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


@given(pool=st.integers(1, 60), share=st.floats(0.01, 1), seed=st.integers(0, 2**40), epoch=st.integers(0, 5))
def test_no_image_returns_before_the_pool_is_exhausted(pool: int, share: float, seed: int, epoch: int) -> None:
    """The rounds of one shuffle share no image, and leave fewer than one round's worth."""
    count = max(1, int(pool * share))
    rounds = pool // count
    drawn = [draw(pool, count, seed, epoch * rounds + i + 1) for i in range(rounds)]
    seen = np.concatenate(drawn)
    assert all(len(indices) == count for indices in drawn)
    assert len(set(seen.tolist())) == len(seen) > pool - count
    assert set(seen.tolist()) <= set(range(pool))


def test_the_pool_is_reshuffled() -> None:
    """The second pass over the pool has another order."""
    assert not np.array_equal(draw(100, 100, 0, 1), draw(100, 100, 0, 2))


finite = st.floats(0, 1e12, allow_nan=False)
queries = st.lists(st.builds(Query, st.integers(0, 64), finite, st.sampled_from(["", *REASONS])), max_size=4).map(tuple)
words = st.text(max_size=20)


@st.composite
def results(draw_value: st.DrawFn) -> RoundResult:
    size = draw_value(st.integers(1, 12))
    flags = st.lists(st.booleans(), min_size=size, max_size=size).map(tuple)
    attacks = st.lists(st.builds(AttackResult, words, flags), max_size=3).map(tuple)
    fields = [st.integers(1, 10**9), words, st.integers(1, 99).map(str), st.just("linf"), words, finite, finite]
    return RoundResult(*(draw_value(field) for field in [*fields, flags, attacks, queries]))


failures = st.builds(RoundFailure, st.integers(1), words, st.sampled_from(REASONS), words, finite, finite, queries)


@given(st.one_of(results(), failures))
def test_a_round_survives_json(outcome: Round) -> None:
    """What is read back equals what was written, through real JSON text."""
    assert round_from_json(json.loads(json.dumps(outcome.to_json(), allow_nan=False))) == outcome


@pytest.mark.parametrize(
    "damage",
    [
        {"format": "dfmcl.round/2"},
        {"correct": "0101"},
        {"surprise": 1},
        {"attacks": [{"name": "fgsm"}]},
        {"queries": [{"images": 1}]},
        {"outcome": "failed"},
    ],
    ids=lambda damage: next(iter(damage)),
)
def test_a_damaged_record_is_bad_input(damage: dict[str, object]) -> None:
    """A record of another format, with missing, unknown or contradictory entries, is refused."""
    whole = measured(run_round(plan(), 1, predict=served, clock=Clock())).to_json()
    with pytest.raises(BadInput, match=r"^round: "):
        round_from_json(whole | damage)
