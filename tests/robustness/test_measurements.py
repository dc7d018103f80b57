"""What `dfmcl evaluate` measures of a run."""

from __future__ import annotations

from pathlib import Path

from dfmcl.robustness.data import load_dataset
from dfmcl.robustness.measurements import measure
from dfmcl.robustness.runs import load_run
from dfmcl.robustness.threats.registry import parse_threat


def test_a_suite_shows_each_attack_what_is_left(standard_run: Path) -> None:
    """In a cascade an attack tries what the ones before left, and its accuracy is the worst case so far."""
    run, data, threat = load_run(standard_run), load_dataset("digits"), parse_threat("8/255")
    (apart,) = measure(run, data, [threat], attacks=["fgsm", "margin-pgd-5"], images=60)
    (suite,) = measure(run, data, [threat], attacks=["fgsm", "margin-pgd-5"], cascade=True, images=60)
    assert suite.correct == apart.correct
    assert suite.attacks[0].held == apart.attacks[0].held
    assert 0 < sum(suite.attacks[1].tried) < sum(apart.attacks[1].tried)
    assert suite.attacks[1].tried == suite.attacks[0].held
    assert suite.robust_images == suite.attacks[1].held
    assert abs(suite.robust.value - apart.robust.value) < 0.05  # other random starts
