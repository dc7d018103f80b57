"""The frame: it believes no attack, and its records survive JSON."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dfmcl.common.errors import BadInput
from dfmcl.robustness.attacks.registry import Attack
from dfmcl.robustness.data import load_dataset
from dfmcl.robustness.evaluate import evaluate
from dfmcl.robustness.models import Classifier, to_bytes, to_float
from dfmcl.robustness.records import AttackRecord, Evaluation
from dfmcl.robustness.runs import load_run
from dfmcl.robustness.threats.linf import Linf
from dfmcl.robustness.threats.registry import threat_of

THREAT = threat_of("linf", "8/255")


@pytest.fixture(scope="module")
def model(standard_run: Path) -> Classifier:
    return load_run(standard_run).model


@pytest.fixture(scope="module")
def images() -> np.ndarray[Any, Any]:
    return load_dataset("digits").x_test[:24]


@pytest.fixture(scope="module")
def labels(model: Classifier, images: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """The model's own answers, so that every image starts out right; two are made wrong."""
    with torch.no_grad():
        answers = model(to_float(torch.from_numpy(images))).argmax(dim=1).numpy().astype(np.int64)
    answers[:2] = (answers[:2] + 1) % 10
    return answers


def attack(function: Any) -> Attack:
    return Attack("test", function)


def test_an_image_outside_the_ball_is_no_success(model: Classifier, images: Any, labels: Any) -> None:
    """An attack that leaves the ball is counted as outside, and the images stand."""
    cheat = attack(lambda model, x, y, threat, generator, trial: (x + 3 * threat.eps).clamp(0, 1))
    outcome = evaluate(model, images, labels, THREAT, [cheat])
    assert outcome.evaluation.robust.k == 22
    assert outcome.evaluation.attacks[0].outside == 22


@pytest.mark.parametrize("grid", [True, False])
def test_not_a_number_is_no_success(model: Classifier, images: Any, labels: Any, grid: bool) -> None:
    """An attack that returns NaN has found nothing."""
    broken = attack(lambda model, x, y, threat, generator, trial: x * float("nan"))
    outcome = evaluate(model, images, labels, THREAT, [broken], grid=grid)
    assert outcome.evaluation.robust.k == 22
    assert outcome.evaluation.attacks[0].outside == 22
    assert np.array_equal(outcome.adversarial, images)


def test_the_frame_classifies_again(model: Classifier, images: Any, labels: Any) -> None:
    """Doing nothing breaks nothing, whatever the attack would claim."""
    outcome = evaluate(model, images, labels, THREAT, [attack(lambda model, x, y, threat, generator, trial: x)])
    assert outcome.evaluation.clean.k == outcome.evaluation.robust.k == 22


def test_cascade_and_full_run_agree_on_the_worst_case(model: Classifier, images: Any, labels: Any) -> None:
    """Showing an attack only what is left changes its cost, not the worst case (deterministic attacks)."""
    suite = [Attack.parse("fgsm"), Attack.parse("mi-fgsm-5")]
    full = evaluate(model, images, labels, THREAT, suite, batch_size=24).evaluation
    cascade = evaluate(model, images, labels, THREAT, suite, batch_size=24, cascade=True).evaluation
    assert full.robust_images == cascade.robust_images
    assert sum(cascade.attacks[1].tried) < sum(full.attacks[1].tried)


def test_the_deciders_answer_counts(model: Classifier, images: Any, labels: Any) -> None:
    """With a decider that is never fooled, gradients of the model break nothing."""
    right = torch.from_numpy(labels)

    def oracle(x: torch.Tensor) -> torch.Tensor:
        index = [
            int(np.abs(images.astype(int) - to_bytes(one[None]).numpy()[0]).sum(axis=(1, 2, 3)).argmin()) for one in x
        ]
        return torch.nn.functional.one_hot(right[index], 10).float()

    outcome = evaluate(model, images, labels, THREAT, [Attack.parse("pgd-5")], decide=oracle, grid=True)
    assert outcome.evaluation.robust.k == len(images)


def test_adversarial_bytes_reproduce_the_verdict(model: Classifier, images: Any, labels: Any) -> None:
    """The bytes kept for each image lie in the ball and give the recorded answer when classified again."""
    outcome = evaluate(model, images, labels, THREAT, [Attack.parse("pgd-10")], grid=True)
    distance = np.abs(outcome.adversarial.astype(int) - images.astype(int)).max()
    assert distance <= 8
    with torch.no_grad():
        logits = model(to_float(torch.from_numpy(outcome.adversarial)))
    held = (logits.argmax(dim=1).numpy() == labels) & np.array(outcome.evaluation.correct)
    assert held.tolist() == list(outcome.evaluation.robust_images)
    assert np.allclose(logits.numpy(), outcome.adversarial_logits, atol=1e-4)
    assert outcome.evaluation.robust.k < outcome.evaluation.clean.k


@pytest.mark.parametrize("wild", [float("nan"), float("inf"), float("-inf")])
def test_logits_that_are_not_finite_are_wrong(model: Classifier, images: Any, labels: Any, wild: float) -> None:
    """argmax makes a class of them, which may be the right one: counted as wrong, and counted by themselves."""
    shown, spoilt = to_float(torch.from_numpy(images)), list[int]()
    target = model(shown).argmax(dim=1)

    def decide(x: torch.Tensor) -> torch.Tensor:
        logits = model(x)
        rows = (x[:, None] == shown[None, ::2]).flatten(2).all(dim=2).any(dim=1)
        spoilt.append(int(rows.sum()))
        return torch.where(rows[:, None] & (torch.arange(logits.shape[1]) == 0), wild, logits)

    outcome = evaluate(model, images, target.numpy(), Linf(1 / 255), [], decide=decide, grid=True)
    assert outcome.evaluation.not_finite == spoilt[0] == len(images[::2])
    assert outcome.evaluation.correct == tuple(number % 2 == 1 for number in range(len(images)))
    assert Evaluation.from_json(outcome.evaluation.to_json()).not_finite == len(images[::2])


def test_an_attack_that_reaches_no_number_has_fooled(model: Classifier, images: Any, labels: Any) -> None:
    """A model that overflows one grey level away does not resist there."""
    shown = to_float(torch.from_numpy(images))
    target = model(shown).argmax(dim=1)

    def decide(x: torch.Tensor) -> torch.Tensor:
        same = (x[:, None] == shown[None]).flatten(2).all(dim=2).any(dim=1)
        return torch.where(same[:, None], model(x), torch.nan)

    attack = Attack.parse("fgsm")
    outcome = evaluate(model, images, target.numpy(), Linf(1 / 255), [attack], decide=decide, grid=True)
    assert (outcome.evaluation.clean.k, outcome.evaluation.robust.k) == (len(images), 0)


def test_no_images_is_bad_input(model: Classifier, images: Any, labels: Any) -> None:
    """Nothing to look at is an error, not 100 %."""
    with pytest.raises(BadInput, match="no images"):
        evaluate(model, images[:0], labels[:0], THREAT, [Attack.parse("fgsm")])


flags = st.lists(st.booleans(), min_size=1, max_size=12).map(tuple)


@st.composite
def evaluations(draw: st.DrawFn) -> Evaluation:
    correct = draw(flags)
    column = st.lists(st.booleans(), min_size=len(correct), max_size=len(correct)).map(tuple)
    record = st.builds(
        AttackRecord,
        name=st.text(),
        parameters=st.dictionaries(st.text(), st.integers()),
        held=column,
        tried=column,
        outside=st.integers(0, 9),
        seconds=st.floats(0, 1e6),
    )
    return Evaluation(
        threat=threat_of(draw(st.sampled_from(["linf", "l2"])), draw(st.floats(0, 1))),
        grid=draw(st.booleans()),
        seed=draw(st.integers(0, 2**31)),
        correct=correct,
        attacks=tuple(draw(st.lists(record, max_size=3))),
        seconds=draw(st.floats(0, 1e6)),
        about=draw(st.dictionaries(st.text(), st.text())),
    )


@given(evaluations())
def test_records_survive_json(evaluation: Evaluation) -> None:
    """What is written and read again is equal."""
    import json

    assert Evaluation.from_json(json.loads(json.dumps(evaluation.to_json()))) == evaluation


@given(evaluations())
def test_worst_case_is_never_above_any_attack(evaluation: Evaluation) -> None:
    """Robust accuracy is at most clean accuracy and at most each attack's."""
    assert evaluation.robust.k <= min([evaluation.clean.k, *(record.accuracy.k for record in evaluation.attacks)])
