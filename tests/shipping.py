"""A stand-in for the shipped model: really trained, exported as float16, gated, promoted, with surrogate and card."""

from __future__ import annotations

from pathlib import Path

from gating.gate import gate
from gating.policy import Policy
from serving.card import write_card
from serving.export import export
from serving.promotion import promote
from training.pack import pack

NAME = "stand-in"
POLICY = Policy.model_validate(
    {
        "criteria": ["robust_accuracy >= 0.05 at 95 %", "clean_accuracy >= 0.5 at 95 %"],
        "threat": {"eps": "3/255"},
        "data": {"name": "digits", "images": 100},
        "attacks": {"suite": ["fgsm", "pgd-3"]},
    }
)


def ship(run: Path, surrogate: Path) -> Path:
    """A repository with one shipped model, made once beside its run; returns its path. Tests that change it copy it."""
    folder = run.parent / "shipped"
    repository = folder / "models"
    if repository.exists():
        return repository
    export(run, folder / "candidate", weights="float16")
    report = gate(folder / "candidate", run, POLICY, folder / "evidence")
    assert (report["verdict"], report["findings"]) == ("passed", [])  # artefact_disagrees among the checks
    promote(folder / "candidate", folder / "evidence", repository, name=NAME)
    pack(surrogate, repository / NAME / "surrogates" / "other")
    write_card(run, repository, NAME)
    return repository
