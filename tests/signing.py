"""Signed evidence without running a gate: a minimal report for a real candidate, and real keys."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from gating.attestation import ATTESTATION, Trust, candidate_files, sign
from gating.keys import keygen, read_public
from robustness.files import sha256_of
from robustness.records import AttackRecord, Evaluation
from robustness.threat import Threat

CREATED = "2026-01-02T03:04:05+00:00"
VALID_DAYS = 36500  # tests that are not about expiry must not expire
POLICY = "a" * 64


def make_key(folder: Path, name: str = "release") -> Path:
    """A new key pair; returns the private one's path."""
    folder.mkdir(parents=True, exist_ok=True)
    keygen(folder / name)
    return folder / f"{name}.key"


def trusting(*keys: Path, **options: Any) -> Trust:
    """Trust in the public halves of these private keys."""
    return Trust(tuple(read_public(key.with_suffix(".pub")) for key in keys), **options)


def write_trust(key: Path) -> Path:
    """A trust file beside a key that trusts it alone, by any policy; returns its path."""
    path = key.with_suffix(".toml")
    path.write_text(f'keys = ["{key.with_suffix(".pub").name}"]\n')
    return path


def minimal_report(files: dict[str, str], probes_sha256: str, **changes: Any) -> dict[str, Any]:
    """A report that holds all its schema asks for; `changes` replace top-level entries."""
    flags = (True, True, False)
    attack = AttackRecord("fgsm", {"steps": 1}, flags, (True,) * 3, 0, 0.1, 0, (1, 1, 1), (1, 1, 1))
    evaluation = Evaluation(Threat.parse("linf", "38/255"), True, 0, (True,) * 3, (attack,), 0.1)
    return {
        "format": "dfmcl.report/2",
        "created": CREATED,
        "verdict": "passed",
        "exit_code": 0,
        "reasons": [],
        "statistics": {"kind": "sequential", "population": 450, "attacked": 3, "cap": 450, "order_sha256": "b" * 64},
        "criteria": [criterion("robust_accuracy", 0.45), criterion("clean_accuracy", 0.9)],
        "progress": [{"images": 3, "criterion": 0, "lower": 0.5, "upper": 0.9}],
        "checks": [check("outputs_differ", "clear"), check("seen_images", "not_run")],
        "findings": [],
        "evaluation": evaluation.to_json(),
        "radii": [],
        "transfer": [],
        "per_image": {"index": [7, 1, 3], "label": [0, 1, 2]},
        "baseline": None,
        "files": {"probes.npz": probes_sha256},
        "policy": {
            "criteria": ["robust_accuracy >= 0.45 at 95 %", "clean_accuracy >= 0.9 at 95 %"],
            "seed": 0,
            "valid_days": VALID_DAYS,
            "threat": {"norm": "linf", "eps": "38/255"},
            "data": {"name": "digits"},
            "attacks": {"suite": ["fgsm"]},
            "sha256": POLICY,
        },
        "candidate": {
            "kind": "candidate",
            "name": "candidate",
            "model_sha256": files["model.onnx"],
            "files": files,
            "input": {"dtype": "uint8", "layout": "NHWC", "shape": [16, 16, 3]},
        },
        "run": {"checkpoint_sha256": "c" * 64},
        "data": {"name": "digits", "sha256": "d" * 64, "part": "test", "images": 450, "classes": list("0123456789")},
        "code": {"revision": "e" * 40},
        "versions": {"python": "3.11.7"},
        "hardware": {"machine": "x86_64"},
        "seconds": 0.1,
        "processes": 1,
        **changes,
    }


def criterion(metric: str, threshold: float, outcome: str = "met") -> dict[str, Any]:
    """A row of criteria."""
    return {
        "criterion": f"{metric} >= {threshold:g} at 95 %",
        "metric": metric,
        "eps": None,
        "class": None,
        "threshold": threshold,
        "confidence": 0.95,
        "outcome": outcome,
        "decided_after": 3,
        "k": 2,
        "n": 3,
        "value": 2 / 3,
        "lower": 0.5,
        "upper": 0.9,
    }


def check(name: str, outcome: str) -> dict[str, Any]:
    """A row of checks."""
    return {"check": name, "outcome": outcome, "when": "always", "why": "", "do": "", "figures": {}}


def write_report(evidence: Path, report: dict[str, Any], *keys: Path) -> Path:
    """report.json, and the attestation where keys are given, in an evidence directory that holds its probes."""
    (evidence / "report.json").write_text(json.dumps(report))
    if keys:
        days = report["policy"]["valid_days"]
        (evidence / ATTESTATION).write_text(sign(report, sha256_of(evidence / "report.json"), keys, expires_days=days))
    return evidence


def sign_again(evidence: Path, key: Path, **changes: Any) -> None:
    """Evidence whose report is changed and whose signature fits the change, as by a gate that found something else."""
    report = json.loads((evidence / "report.json").read_text()) | changes
    report["files"] = {name: sha256_of(evidence / name) for name in report["files"]}
    write_report(evidence, report, key)


def report_on(candidate: Path, evidence: Path, **changes: Any) -> dict[str, Any]:
    """A minimal report about a candidate on disk, whose probes lie in the evidence directory."""
    return minimal_report(candidate_files(candidate), sha256_of(evidence / "probes.npz"), **changes)
