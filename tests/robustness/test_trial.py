"""What an attack costs and whom it fools: counted by the frame, as passes that were really made."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from dfmcl.robustness.attacks.registry import ATTACKS, Attack
from dfmcl.robustness.attacks.trial import Trial
from dfmcl.robustness.data import load_dataset
from dfmcl.robustness.evaluate import evaluate
from dfmcl.robustness.models import Classifier, exactly, to_float
from dfmcl.robustness.runs import load_run
from dfmcl.robustness.seeds import generator
from dfmcl.robustness.threats.ball import Ball
from dfmcl.robustness.threats.l2 import L2
from dfmcl.robustness.threats.registry import threat_of

THREAT = threat_of("linf", "8/255")


@pytest.fixture(scope="module")
def model(standard_run: Path) -> Classifier:
    return load_run(standard_run).model


@pytest.fixture(scope="module")
def batch() -> tuple[Tensor, Tensor]:
    data = load_dataset("digits")
    return to_float(torch.from_numpy(data.x_test[:16])), torch.from_numpy(data.y_test[:16])


class Counted:
    """The model, and how many images went through it, with and without a gradient."""

    def __init__(self, model: Classifier) -> None:
        self.model, self.forward, self.backward = model, 0, 0

    def __call__(self, x: Tensor) -> Tensor:
        self.forward += len(x)
        logits: Tensor = self.model(x)
        if x.requires_grad:
            logits.register_hook(self.count)
        return logits

    def count(self, gradient: Tensor) -> None:
        self.backward += len(gradient)


NAMES = [
    *("fgsm", "pgd-7x2", "mi-fgsm-4", "cw-l2-5", "apgd-ce-9x2", "apgd-t-6", "cr-15x2", "square-30", "subspace-3x2"),
    "square-subspace-40",
]


@pytest.mark.parametrize("name", NAMES)
def test_every_pass_is_counted(model: Classifier, batch: tuple[Tensor, Tensor], name: str) -> None:
    """The trial's sums are the images that went through the model, forward and backward."""
    x, y = batch
    counted, trial = Counted(model.requires_grad_(False)), Trial(y)
    threat = L2(0.5) if name.startswith("cw") else THREAT
    Attack.parse(name)(counted, x, y, threat, generator=generator(0, name), trial=trial)
    assert (int(trial.forward.sum()), int(trial.backward.sum())) == (counted.forward, counted.backward)
    assert trial.forward.min() >= 1


def test_a_point_that_does_not_count_lets_the_image_go_on(model: Classifier, batch: tuple[Tensor, Tensor]) -> None:
    """Without confirmation an image stays in the batch to the last step, and is noted; with it, it leaves."""
    x, y = batch
    never, always = Trial(y, lambda rows, points: torch.zeros(len(rows), dtype=torch.bool)), Trial(y)
    for trial in (never, always):
        Attack.parse("pgd-10")(model, x, y, THREAT, generator=generator(0), trial=trial)
    assert not never.fooled.any()
    assert (never.forward == 11).all()
    assert torch.equal(never.unconfirmed, always.fooled)
    assert always.fooled.sum() >= 8
    assert (always.forward[always.fooled] < 11).any()


def test_an_attack_goes_on_until_the_bytes_fall(model: Classifier) -> None:
    """What rounding to bytes takes away is looked for again: on the grid PGD-20 breaks as much as in float."""
    data = load_dataset("digits")
    chosen = [Attack.parse("pgd-20")]
    threat = threat_of("linf", "3/255")
    on_bytes = evaluate(model, data.x_test[:128], data.y_test[:128], threat, chosen, grid=True).evaluation
    in_float = evaluate(model, data.x_test[:128], data.y_test[:128], threat, chosen).evaluation
    assert on_bytes.attacks[0].flipped >= in_float.attacks[0].flipped - 2 > 20
    assert on_bytes.attacks[0].unconfirmed is not None


def test_what_fell_stays_found_whatever_the_attack_returns(model: Classifier) -> None:
    """An attack that forgets its finds and returns the images themselves is believed for what it showed."""

    def forgetful(model: Any, x: Tensor, y: Tensor, threat: Ball, **rest: Any) -> Tensor:
        ATTACKS["pgd"].function(model, x, y, threat, steps=10, **rest)
        return x

    data = load_dataset("digits")
    outcome = evaluate(model, data.x_test[:32], data.y_test[:32], THREAT, [Attack("forgetful", forgetful)], grid=True)
    honest = evaluate(model, data.x_test[:32], data.y_test[:32], THREAT, [Attack.parse("pgd-10")], grid=True)
    assert outcome.evaluation.robust.k < outcome.evaluation.clean.k - 10
    assert abs(outcome.evaluation.robust.k - honest.evaluation.robust.k) <= 1  # another name draws another start
    with torch.no_grad():
        answers = model(to_float(torch.from_numpy(outcome.adversarial))).argmax(dim=1).numpy()
    held = (answers == data.y_test[:32]) & np.array(outcome.evaluation.correct)
    assert held.tolist() == list(outcome.evaluation.robust_images)


def test_queries_are_counted_where_nothing_but_the_decider_answers(model: Classifier) -> None:
    """Without gradients the attack asks the decider: a query an image and step, and one for each look of the frame."""
    data = load_dataset("digits")
    asked: list[int] = []

    def decide(x: Tensor) -> Tensor:
        asked.append(len(x))
        return exactly(model)(x)

    with torch.no_grad():
        suite = [Attack.parse("square-25")]
        outcome = evaluate(None, data.x_test[:20], data.y_test[:20], THREAT, suite, decide=decide, grid=True)
    (record,) = outcome.evaluation.attacks
    looks = len(outcome.evaluation.correct) + sum(record.tried)
    assert sum(asked) == sum(record.forward) + looks
    assert record.backward == (0,) * 20
    assert max(record.forward) <= 25
    fell = [cost for cost, held, tried in zip(record.forward, record.held, record.tried, strict=True) if tried > held]
    assert fell, "square found nothing"
    assert max(fell) < 25


def test_what_fell_in_a_smaller_ball_has_fallen_in_a_larger(model: Classifier) -> None:
    """An evaluation after another one attacks only what is left, and keeps what was found."""
    data = load_dataset("digits")
    small, large = (threat_of("linf", eps) for eps in ("2/255", "4/255"))
    images, labels, suite = data.x_test[:64], data.y_test[:64], [Attack.parse("pgd-5")]
    first = evaluate(model, images, labels, small, suite, grid=True, cascade=True)
    second = evaluate(model, images, labels, large, suite, grid=True, cascade=True, after=first)
    fell = ~np.array(first.evaluation.robust_images)
    assert fell.sum() > 3
    assert not np.array(second.evaluation.robust_images)[fell].any()
    assert not np.array(second.evaluation.attacks[0].tried)[fell].any()
    assert np.array_equal(second.adversarial[fell], first.adversarial[fell])
    assert second.evaluation.robust.k < first.evaluation.robust.k
