"""Honest models raise no check: benchmarks/checks.py says so of many, these are a few of every kind."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from dfmcl.gating.foreign import kept
from dfmcl.robustness.attacks.registry import Attack
from dfmcl.robustness.background import Background
from dfmcl.robustness.checks import diagnose
from dfmcl.robustness.data import Dataset, load_dataset
from dfmcl.robustness.evaluate import evaluate
from dfmcl.robustness.memorisation import repeated
from dfmcl.robustness.models import exactly, to_float
from dfmcl.robustness.runs import load_run
from dfmcl.robustness.threats.registry import threat_of
from tests.networks import Networks

N = 32
# The plain network is the honest twin of the traps, in test_checks.py.
MODELS = ("pgd-at", "trades", "dfmcl", "dfmcl-ranked")
# The checks err on at most one honest network in a hundred (benchmarks/checks.py); more than two of four networks that
# nobody has seen before do so once in 200,000 draws. The pinned ones are known to raise none.
ALLOWED = 2


def raised(run: Path, digits: Dataset, other: nn.Module) -> dict[str, str]:
    """What a network raises, or leaves out, of all checks, and why."""
    model, threat = load_run(run).model, threat_of("linf", "3/255")
    images, labels = digits.x_test[:N], digits.y_test[:N]
    suite = [Attack.parse(attack) for attack in ("cr", "apgd-ce-5", "apgd-t-3", "square-20")]
    evaluation = evaluate(model, images, labels, threat, suite, grid=True, cascade=True).evaluation
    about = {
        "run": {"data": digits.sha256},
        "data": {"sha256": digits.sha256, "part": "test", "in_training": repeated(images, np.asarray(digits.x_train))},
    }
    decide = exactly(model)
    background = Background(
        training=(digits.x_train[:256], digits.y_train[:256]),
        others={"another network": other},
        recalled=(images, decide(to_float(torch.from_numpy(images))).detach().numpy()),
        state=lambda: kept(model),
    )
    results = diagnose(
        model,
        decide,
        images,
        labels,
        threat,
        grid=True,
        seed=0,
        evaluation=evaluation,
        about=about,
        background=background,
    )
    assert evaluation.clean.value > 0.6
    return {result.check: result.why for result in results if result.outcome != "clear"}


def test_honest_models_raise_nothing(networks: Networks, pytestconfig: pytest.Config) -> None:
    """However they were trained, with masks or without: no check is raised, and all of them run."""
    digits, other = load_dataset("digits"), load_run(networks("other")).model
    found = {name: why for name in MODELS if (why := raised(networks(name), digits, other))}
    assert len(found) <= (ALLOWED if pytestconfig.getoption("--fixture-seed") else 0), found
