"""What is asked of an endpoint: searches by queries against a model whose borders are known."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from dfmcl.common.errors import BadInput
from dfmcl.monitoring.asker import Asker
from dfmcl.monitoring.probes import NO_ATTACK, PROBES, Scene, query_attack
from dfmcl.robustness.attacks.registry import Attack
from dfmcl.robustness.threats.ball import Ball
from dfmcl.robustness.threats.l2 import L2
from dfmcl.robustness.threats.linf import Linf
from dfmcl.robustness.threats.registry import threat_of
from dfmcl.serving.clients.triton import Answer
from tests.linear import Linear
from tests.linear import images as near_grey
from tests.monitoring.clocks import Still
from tests.monitoring.greys import BALL, GREYS, LABELS, brightness, manners, pictures, pool

RIGHT = np.flatnonzero(GREYS != 250)


class Asked:
    """An endpoint that remembers the bytes it was asked about."""

    def __init__(self, model: Callable[[Tensor], Tensor] = brightness) -> None:
        self.model, self.images = model, list[np.ndarray]()

    def __call__(self, images: np.ndarray) -> np.ndarray:
        assert images.dtype == np.uint8
        self.images.append(images)
        with torch.no_grad():
            return self.model(torch.from_numpy(images).float().permute(0, 3, 1, 2) / 255).numpy()


def scene(threat: Ball = BALL) -> Scene:
    """The greys that are right."""
    return Scene(pool().images[RIGHT], LABELS[RIGHT], threat, 0, 1, {})


@pytest.mark.parametrize(("name", "sure"), [("square-200", [120, 135]), ("rays-200", [110, 120, 135, 145])])
def test_a_search_finds_what_there_is_and_no_more(name: str, sure: list[int]) -> None:
    """No grey falls that is farther than 20 from the border; all others do by labels, which try one sign for all pixels
    first, and the nearer half by scores, whose squares differ."""
    found = PROBES["query"](scene(), query_attack(name), Asked())
    flipped = found.answers != scene().labels
    assert set(sure) <= set(GREYS[RIGHT][flipped].tolist()) <= {110, 120, 135, 145}
    assert set(found.answers[flipped]) == {-1}


@pytest.mark.parametrize("name", ["square-60", "rays-60"])
def test_what_is_shown_was_asked_about_inside_the_ball_and_fools(name: str) -> None:
    """The bytes of each success are at most eps away, went over the wire, and get another answer."""
    asked = Asked()
    found = PROBES["query"](scene(), query_attack(name), asked)
    sent = {image.tobytes() for images in asked.images for image in images}
    for image, shown, label, answer in zip(scene().images, found.images, scene().labels, found.answers, strict=True):
        if answer == label:
            assert np.array_equal(image, shown)
            continue
        assert np.abs(image.astype(int) - shown).max() <= 20
        assert shown.tobytes() in sent
        assert asked(shown[None]).argmax() != label


@pytest.mark.parametrize("name", ["square-17", "rays-17"])
def test_queries_are_exact_and_within_the_budget(name: str) -> None:
    """What is counted is what was asked: 17 an image that holds, fewer for one that falls."""
    asked = Asked()
    found = PROBES["query"](scene(), query_attack(name), asked)
    assert found.queries == sum(len(images) for images in asked.images)
    assert found.queries <= 17 * len(RIGHT)
    hopeless = Scene(pool().images[:2], LABELS[:2], Linf(1 / 255), 0, 1, {})
    assert PROBES["query"](hopeless, query_attack(name), Asked()).queries == 34


def test_what_lies_outside_the_ball_does_not_count() -> None:
    """RayS asks about images far outside, which are other images: what fools there is no success."""
    asked = Asked()
    far = Scene(pool().images[:2], LABELS[:2], Linf(2 / 255), 0, 1, {})
    found = PROBES["query"](far, query_attack("rays-50"), asked)
    fooled = [images[asked(images).argmax(1) != 0] for images in list(asked.images)]
    assert sum(len(images) for images in fooled) > 0
    assert (found.answers == far.labels).all()


def test_an_attack_that_claims_what_does_not_hold_gains_nothing() -> None:
    """A point that leaves the L2 ball when it becomes bytes is asked about and not counted."""

    def rogue(model: Any, x: Tensor, y: Tensor, threat: Any, *, generator: Any, trial: Any, queries: int = 1) -> Tensor:
        points = 1 - x
        trial.look(torch.arange(len(x)), points, model(points), gradient=False)
        return points

    found = PROBES["query"](scene(L2(0.1)), Attack("rogue", rogue), Asked())
    assert (found.answers == scene().labels).all()
    assert found.queries == len(RIGHT)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_square_agrees_with_the_known_distance(norm: str) -> None:
    """Of a linear model the least perturbation is known: nothing nearer than the border falls."""
    model = Linear((3, 8, 8))
    images = (near_grey(24, (3, 8, 8)) * 255).round().to(torch.uint8)
    least = model.least(images / 255, norm).numpy()
    threat = threat_of(norm, float(np.median(least))).on_grid()
    labels = model(images / 255).argmax(dim=1).numpy()
    subject = Scene(images.permute(0, 2, 3, 1).numpy().copy(), labels, threat, 0, 1, {})
    found = PROBES["query"](subject, query_attack("square-300"), Asked(model))
    fell = found.answers != labels
    assert not (fell & (least > threat.eps)).any()


def test_a_search_without_images_asks_nothing() -> None:
    """Where every clean image is wrong there is nothing to attack."""
    asked = Asked()
    none = scene().only(np.zeros(len(RIGHT), bool))
    found = PROBES["query"](none, query_attack("square-10"), asked)
    assert (found.queries, len(found.answers), asked.images) == (0, 0, [])


def test_a_search_repeats_by_number() -> None:
    """The same round asks the same questions, another one others."""

    def bytes_of(number: int) -> bytes:
        asked = Asked()
        subject = Scene(pool().images[:2], LABELS[:2], BALL, 0, number, {})
        PROBES["query"](subject, query_attack("square-10"), asked)
        return b"".join(images.tobytes() for images in asked.images)

    assert bytes_of(1) == bytes_of(1) != bytes_of(2)


def test_a_search_goes_through_the_frame() -> None:
    """Its questions are cut into requests and counted like all others."""
    endpoint = Asker(2, Still(), manners())
    asked = Asked()
    images = np.repeat(pool().images[:1], 20, axis=0)
    subject = Scene(images, np.zeros(20, np.int64), BALL, 0, 1, {})
    ask = endpoint.through(lambda images: Answer(asked(images), "1"))
    found = PROBES["query"](subject, query_attack("square-3"), ask)
    assert [query.images for query in endpoint.queries] == [4] * 15
    assert found.queries == 60


def test_clean_and_transfer_ask_once() -> None:
    """The images as they are, and as they were crafted before."""
    asked = Asked()
    images = pictures()
    subject = Scene(images, LABELS, BALL, 0, 1, {"fgsm": 255 - images})
    clean = PROBES["clean"](subject, NO_ATTACK, asked)
    transfer = PROBES["transfer"](subject, Attack.parse_transfer("fgsm"), asked)
    assert [len(images) for images in asked.images] == [8, 8]
    assert np.array_equal(asked.images[1], 255 - images)
    assert (clean.answers != transfer.answers).all()
    assert (clean.queries, transfer.queries) == (8, 8)


def test_transfer_keeps_the_last_iterate() -> None:
    """An attack that stops at the border of the surrogate would say little about the target."""
    assert Attack.parse_transfer("pgd-7").parameters == {"steps": 7, "keep": "last"}
    for name in ("mi-fgsm", "di-fgsm", "ti-fgsm", "vmi-fgsm"):
        assert Attack.parse_transfer(name).parameters == {"steps": 10, "keep": "last"}


def test_a_search_needs_a_budget_and_nothing_but_answers() -> None:
    """`square` alone would ask thousands of times; PGD needs gradients."""
    assert query_attack("rays-50").parameters["queries"] == 50
    with pytest.raises(BadInput, match="a live endpoint needs a budget; write square-100"):
        query_attack("square")
    with pytest.raises(BadInput, match="'pgd-10' is no search by queries; choose one of square, rays"):
        query_attack("pgd-10")
