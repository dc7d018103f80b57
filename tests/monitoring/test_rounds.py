"""One round against outcomes counted by hand: what is asked in which order, and a whole result or none."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from dfmcl.common.errors import Unavailable
from dfmcl.monitoring.asker import Latencies, Stopped
from dfmcl.monitoring.crafting import scenes
from dfmcl.monitoring.probes import query_attack
from dfmcl.monitoring.releases import Release, Replay
from dfmcl.monitoring.results import GATEWAY, AttackResult, Round, RoundResult, round_from_json
from dfmcl.monitoring.rounds import EXAMPLES, run_query_round
from dfmcl.serving.clients.triton import Answer
from tests.monitoring.clocks import Still, Ticking
from tests.monitoring.greys import (
    BALL,
    EPS,
    GREYS,
    LABELS,
    brightness,
    crafted,
    failed,
    manners,
    measured,
    one_round,
    order,
    pictures,
    plan,
    pool,
    served,
    skipped,
    stopping,
)


class Served:
    """The model, and the images that it was sent."""

    def __init__(self, predict: Callable[[np.ndarray], Answer] = served) -> None:
        self.predict, self.sent = predict, list[np.ndarray]()

    def __call__(self, images: np.ndarray) -> Answer:
        self.sent.append(images)
        return self.predict(images)

    @property
    def sizes(self) -> list[int]:
        return [len(images) for images in self.sent]


@pytest.mark.parametrize(
    "attack", ["fgsm", "pgd-10", "mi-fgsm-10", "di-fgsm-10", "ti-fgsm-10", "vmi-fgsm-3", "margin-pgd-10"]
)
def test_figures_equal_those_counted_by_hand(attack: str) -> None:
    """Of eight grey images one is wrong already and four lie within eps of the border."""
    result = measured(one_round(plan((attack,))))
    assert result.correct == tuple(order() != 250)
    assert result.attacks[0].held == tuple(np.isin(order(), [10, 100, 155]))
    assert (result.clean.k, result.under(result.attacks[0]).k, result.worst_case.k) == (7, 3, 3)
    assert (result.version, result.epsilon, result.via, result.attacks[0].queries) == ("1", "20/255", "triton", 7)


def test_worst_case_is_per_image() -> None:
    """Two attacks that flip different images leave only the images that neither flips."""
    result = RoundResult(
        *(1, "triton", "m", "1", "linf", "8/255", 0.0, 1.0),
        correct=(True, True, True, False),
        attacks=(
            AttackResult("fgsm", (True, False, True, False), 3),
            AttackResult("pgd-10", (False, True, True, False), 3),
        ),
        queries=(),
    )
    assert [result.under(attack).k for attack in result.attacks] == [2, 2]
    assert result.worst_case.k == 1


def test_the_log_line_says_what_was_found() -> None:
    """Way, model, version, size, replay, clean and attacked accuracy with bounds, and the time, on one line."""
    images = pictures()
    evidence = Release("passed", replay=Replay(images, served(images).logits))
    result = measured(one_round(plan(("fgsm", "pgd-3"), replay=4), number=12, find=lambda version: evidence))
    share = "37.5 % [8.5, 75.5]"
    assert str(result) == (
        "round 12 by triton: model bright v1, 8 images, clean 87.5 %, 4 of 4 replayed as gated, "
        f"transfer fgsm at 20/255 {share}, transfer pgd-3 at 20/255 {share}, worst case {share}, "
        f"{result.seconds:.1f} s"
    )


def test_the_order_of_questions() -> None:
    """One image that tells the version, then clean images, then those that were right, once an attack, inside the
    ball; none twice."""
    server, settings = Served(), plan(("fgsm", "pgd-3"))
    scene = crafted(settings)
    one_round(settings, server, scene=scene)
    right = scene.images[scene.images[:, 0, 0, 0] != 250]
    assert server.sizes == [1, 4, 4, 4, 3, 4, 3]
    assert np.array_equal(server.sent[0], scene.images[:1])
    assert np.array_equal(np.concatenate(server.sent[1:3]), scene.images)
    for adversarial in (np.concatenate(server.sent[3:5]), np.concatenate(server.sent[5:])):
        assert np.abs(adversarial.astype(int) - right).max() == EPS


def test_a_round_in_which_every_clean_image_is_wrong_has_nothing_to_attack() -> None:
    """Accuracy is 0 of n, and no adversarial image is sent."""
    images = pool(labels=(GREYS < 128).astype(np.int64))  # every label is the other one
    server = Served()
    result = measured(one_round(plan(), server, scene=crafted(plan(), images=images)))
    assert (result.clean.k, result.worst_case.k, result.attacks[0].queries) == (0, 0, 0)
    assert server.sizes == [1, 4, 4]


def test_the_cost_is_what_a_round_asks_at_most() -> None:
    """By transfer one question an image and attack, by queries as many as the attack's budget; one for the version."""
    assert plan(("fgsm", "pgd-3"), images=10, replay=4).cost == 1 + 4 + 10 * 3
    assert replace(plan(images=10), attacks=(query_attack("square-100"),)).cost == 1 + 10 * 101
    result = measured(one_round(plan(("fgsm", "pgd-3"))))
    assert sum(query.images for query in result.queries) <= plan(("fgsm", "pgd-3")).cost


def test_what_got_through_is_kept_for_the_page() -> None:
    """At most two images an attack, each with the version that fooled the model, and both classes."""
    result = measured(one_round(plan(("fgsm", "pgd-3"))))
    assert [one.attack for one in result.examples] == ["fgsm"] * EXAMPLES + ["pgd-3"] * EXAMPLES
    for one in result.examples:
        assert np.abs(one.adversarial.astype(int) - one.image).max() <= EPS
        assert served(one.image[None]).logits.argmax() == one.label
        assert served(one.adversarial[None]).logits.argmax() == one.answer != one.label


RECORDED = pictures(np.arange(10, dtype=np.uint8) * 25)


def gated(shift: float = 0.0, rows: int = 10) -> Release:
    """Evidence whose logits are those of the model; from row `rows` on they are shifted."""
    logits = served(RECORDED).logits.copy()
    logits[rows:] += shift
    return Release("passed", replay=Replay(RECORDED, logits))


def test_recorded_answers_are_asked_for_in_turn() -> None:
    """Three a round, the next three in the next, and again from the start; right after the version is known."""
    for number, expected in ((1, [0, 1, 2]), (2, [3, 4, 5]), (4, [9, 0, 1])):
        server = Served()
        result = measured(one_round(plan(replay=3), server, number, find=lambda version: gated()))
        assert np.array_equal(server.sent[1], RECORDED[expected])
        assert server.sizes[:4] == [1, 3, 4, 4]
        assert result.replay is not None
        assert (result.replay.images, result.replay.mismatches) == (3, 0)
        assert result.replay.difference < 0.1


def test_a_recorded_answer_that_differs_is_counted() -> None:
    """Two of four with a logit farther off than is tolerated; the distance is said in units of that."""
    result = measured(one_round(plan(replay=4, tolerance=0.01), find=lambda version: gated(0.025, rows=2)))
    assert result.replay is not None
    assert (result.replay.images, result.replay.mismatches) == (4, 2)
    assert result.replay.difference == pytest.approx(2.5, rel=1e-3)


def test_images_of_further_threats_are_counted_apart() -> None:
    """By kind; they are of the round's images, and a difference is that of its kind."""
    evidence = gated(1.0, rows=4)
    assert evidence.replay is not None
    kinds = ("", "", "patch", "patch", "patch", *["corruption"] * 2, *[""] * 3)
    other = replace(evidence, replay=replace(evidence.replay, kinds=kinds))
    for number, expected in ((1, [("patch", 3, 1), ("corruption", 1, 1)]), (2, [("corruption", 1, 1)])):
        result = measured(one_round(plan(replay=6, tolerance=0.01), number=number, find=lambda version: other))
        assert result.replay is not None
        assert [(part.kind, part.images, part.mismatches) for part in result.replay.further] == expected
        assert round_from_json(json.loads(json.dumps(result.to_json()))) == result
    plain = measured(one_round(plan(replay=4), find=lambda version: gated())).replay
    assert plain is not None
    assert plain.further == ()


def test_the_release_is_that_of_the_version_that_answers() -> None:
    """It is looked up once a round, also where nothing is replayed."""
    for replay in (0, 2):
        versions: list[str] = []
        find = lambda version, seen=versions: (seen.append(version), Release())[1]  # noqa: E731  # it notes what it is asked
        assert measured(one_round(plan(replay=replay), lambda x: served(x, "7"), find=find)).replay is None
        assert versions == ["7"]


def test_evidence_about_other_images_is_a_failure() -> None:
    """It names another model than the watch was given data for."""
    other = Release("passed", replay=Replay(np.zeros((4, 8, 8, 3), np.uint8), np.zeros((4, 2), np.float32)))
    failure = failed(one_round(plan(replay=2), find=lambda version: other))
    assert failure.reason == "rejected"
    assert failure.message == "the gate's images or classes are not those of the watch's data"


@pytest.mark.parametrize("spared", range(7))
def test_the_kill_switch_ends_a_round_without_an_opinion(spared: int) -> None:
    """Wherever it is thrown: skipped, with the questions that had been asked; nothing is asked after it."""
    server, looks = Served(), iter([False] * spared + [True])
    outcome = skipped(one_round(plan(("fgsm", "pgd-3")), server, manners=manners(paused=lambda: next(looks))))
    assert outcome.reason == "paused"
    assert len(outcome.queries) == len(server.sent) == spared


@pytest.mark.parametrize("spared", range(7))
def test_stop_leaves_no_round(spared: int) -> None:
    """Stopped goes through: the loop around the rounds drops this one."""
    server = Served()
    with pytest.raises(Stopped):
        one_round(plan(("fgsm", "pgd-3")), server, manners=manners(wait=stopping(spared)))
    assert len(server.sent) == spared


def test_a_server_that_becomes_slow_is_left_alone() -> None:
    """The round ends at the second slow answer in a row."""
    clock, latencies = Still(), Latencies(5.0)
    for images in (1, 4):
        for _ in range(10):
            latencies.is_slow(images, 0.1)

    def predict(images: np.ndarray) -> Answer:
        clock.now += 0.1 if len(images) == 1 else 2.0
        return served(images)

    outcome = failed(one_round(plan(), predict, clock=clock, manners=manners(latencies=latencies)))
    assert (outcome.reason, len(outcome.queries)) == ("slow", 3)
    assert outcome.seconds == pytest.approx(4.1)


class Jumping(Ticking):
    """A wall clock that falls back by a day while a round is running."""

    def __init__(self) -> None:
        super().__init__()
        self.looks = 0

    def time(self) -> float:
        self.looks += 1
        return 1_700_000_000.0 - (86_400.0 if self.looks > 1 else 0.0)


def test_a_clock_that_falls_back_leaves_no_negative_duration() -> None:
    """Durations are of the clock that cannot jump."""
    clock = Jumping()
    first, second = (measured(one_round(clock=clock, number=number)) for number in (1, 2))
    assert second.started - first.started == -86_400.0
    assert first.seconds > 0
    assert second.seconds > 0
    assert all(query.seconds > 0 for one in (first, second) for query in one.queries)


def test_rounds_follow_from_scenes() -> None:
    """Two rounds send what two scenes in a row hold."""
    settings = plan(("pgd-3",), images=4)
    made = scenes(pool(), brightness, BALL, settings.attacks, seed=0, count=4)
    for number in (1, 2):
        server, scene = Served(), next(made)
        result = measured(one_round(settings, server, number, scene=scene))
        right = np.array(result.correct)
        assert np.array_equal(server.sent[-1], scene.adversarial["pgd-3"][right])


def through_gateway(
    predict: Callable[[np.ndarray], Answer], harmless: Callable[[np.ndarray], Answer] = served, attack: str = "rays-40"
) -> Round:
    """A round of queries about all eight greys."""
    settings = replace(plan(), attacks=(query_attack(attack),))
    scene = replace(pool().scene(BALL, 0, -1, 8), adversarial={})
    return run_query_round(settings, 1, scene, predict, harmless, Ticking(), manners())


def test_a_query_round_asks_as_two_customers() -> None:
    """Clean images with the key of the harmless one, the search about those that were right with the other."""
    attacker, harmless = Served(), Served()
    result = measured(through_gateway(attacker, harmless))
    assert harmless.sizes == [4, 4]
    assert attacker.sizes[:2] == [4, 3]
    assert (result.via, result.clean.k, result.attacks[0].name) == (GATEWAY, 7, "rays-40")
    assert result.attacks[0].queries == sum(attacker.sizes) <= 7 * 40
    held = dict(zip(scene_greys(), result.attacks[0].held, strict=True))
    assert {grey for grey, kept in held.items() if not kept} == {110, 120, 135, 145, 250}
    assert str(result).startswith(
        "round 1 by gateway: model bright v1, 8 images, clean 87.5 %, query rays-40 at 20/255"
    )


def scene_greys() -> list[int]:
    scene = pool().scene(BALL, 0, -1, 8)
    assert sorted(scene.labels) == sorted(LABELS)
    return scene.images[:, 0, 0, 0].tolist()


def test_a_query_round_that_fails_says_which_way() -> None:
    """A gateway that refuses in the middle of a search: no figures, and all questions counted."""
    calls = iter(range(100))

    def predict(images: np.ndarray) -> Answer:
        if next(calls) == 3:
            raise Unavailable("full", "queue_full")
        return served(images)

    failure = failed(through_gateway(predict))
    assert (failure.via, failure.reason, len(failure.queries)) == (GATEWAY, "queue_full", 2 + 4)


def test_a_version_that_differs_between_keys_is_no_round() -> None:
    """Both keys must be answered by one version."""
    assert failed(through_gateway(lambda x: served(x, "2"))).reason == "version_changed"
