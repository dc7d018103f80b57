"""Honest models raise no check: benchmarks/checks.py says so of many, these are a few of every kind."""

from __future__ import annotations

from pathlib import Path

import pytest

from robustness.attacks import Attack
from robustness.checks import diagnose, repeated
from robustness.data import Dataset, load_dataset
from robustness.evaluate import evaluate
from robustness.models import exactly
from robustness.runs import load_run
from robustness.threat import Threat
from training.config import load_config
from training.train import train

N = 48
SMALL = [
    "model.width=8",
    "data.train_images=600",
    "heldout.images=20",
    "heldout.attack_steps=1",
    "optimization.epochs=4",
    "optimization.batch_size=20",
    "optimization.lr=5e-3",
    "curriculum.beta=8/255",
    "curriculum.schedule=constant",
    "curriculum.steps=1",
]
# The plain network is the honest twin of the traps, in test_checks.py.
MODELS = {
    "PGD-AT": ("quickstart_surrogate", []),
    "TRADES": ("quickstart_surrogate", ["curriculum.attacks=['kl']", "objective.name=trades"]),
    "DFMCL": ("quickstart", ["curriculum.schedule=linear"]),
    "DFMCL, ranked": ("quickstart", ["masking.rule=ranked", "masking.rate=0.2", "masking.scaling=inverted"]),
}


@pytest.fixture(scope="module")
def digits() -> Dataset:
    return load_dataset("digits")


@pytest.mark.parametrize("name", MODELS)
def test_an_honest_model_raises_nothing(name: str, digits: Dataset, tmp_path: Path) -> None:
    """However it was trained, with masks or without: no check is raised, and all of them run."""
    preset, overrides = MODELS[name]
    train(load_config(preset, [*SMALL, *overrides]), tmp_path / "run", log=lambda line: None)
    model, threat = load_run(tmp_path / "run").model, Threat.parse("linf", "3/255")
    images, labels = digits.x_test[:N], digits.y_test[:N]
    suite = [Attack.parse(attack) for attack in ("apgd-ce-5", "apgd-t-3", "square-20")]
    evaluation = evaluate(model, images, labels, threat, suite, grid=True, cascade=True).evaluation
    about = {
        "run": {"data": digits.sha256},
        "data": {"sha256": digits.sha256, "part": "test", "in_training": repeated(images, digits.x_train)},
    }
    decide = exactly(model)
    results = diagnose(model, decide, images, labels, threat, grid=True, seed=0, evaluation=evaluation, about=about)
    assert evaluation.clean.value > 0.6
    assert {result.check: result.why for result in results if result.outcome != "clear"} == {}
