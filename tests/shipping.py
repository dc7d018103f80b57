"""A stand-in for the shipped model: trained, exported as float16, gated, signed, promoted, with surrogate and card."""

from __future__ import annotations

from pathlib import Path

from dfmcl.gating.gate import gate
from dfmcl.gating.policy import Policy
from dfmcl.gating.signing.keys import read_signer
from dfmcl.gating.signing.trust import load_trust
from dfmcl.gating.subjects.registry import open_subject
from dfmcl.release.card import write_card
from dfmcl.release.export import export
from dfmcl.release.promotion import promote
from dfmcl.release.stores.directory import Directory
from dfmcl.robustness.runs import load_run
from dfmcl.training.pack import pack
from tests.signing import VALID_DAYS, known_key, write_trust

NAME = "stand-in"
POLICY = Policy.model_validate(
    {
        "statistics": "fixed",  # all 100 images
        "valid_days": VALID_DAYS,
        "criteria": ["robust_accuracy >= 0.05 at 95 %", "clean_accuracy >= 0.5 at 95 %"],
        "threat": {"eps": "3/255"},
        "data": {"name": "digits", "images": 100},
        "attacks": {"suite": ["fgsm", "pgd-3"], "substitute": 0},
    }
)


def ship(run: Path, surrogate: Path, policy: Policy = POLICY, *, transfer: bool = False) -> Path:
    """A repository with one shipped model, made once beside its run, and release.toml, which trusts it, beside it.

    transfer: the gate, too, attacks with the surrogate.
    """
    folder = run.parent / f"shipped-{run.name}"
    repository = folder / "models"
    if repository.exists():
        return repository
    key = known_key(folder)
    export(run, folder / "candidate", weights="float16")
    subject = open_subject(str(folder / "candidate"), run=run)
    surrogates = {"other": load_run(surrogate)} if transfer else {}
    report = gate(subject, policy, folder / "evidence", surrogates=surrogates, signers=[read_signer(key)])
    assert (report.verdict, report.findings) == ("passed", ())  # artefact_disagrees among the checks
    trust = load_trust(write_trust(key))
    promote(folder / "candidate", folder / "evidence", Directory(repository), name=NAME, trust=trust)
    pack(surrogate, repository / NAME / "surrogates" / "other")
    write_card(run, Directory(repository), NAME)
    return repository
