"""What an attestation says: two in-toto statements about the judged bytes, made from the report and nothing else.

Statement v1 and test-result v0.1: github.com/in-toto/attestation/tree/main/spec. The test result is for any verifier
and has no numbers; the robustness predicate is ours and has them.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime, timedelta
from pathlib import PurePath
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dfmcl.gating.signing.evaluation import EvaluationEntry
    from dfmcl.gating.signing.report import Report

from dfmcl.gating.kinds import KINDS

STATEMENT = "https://in-toto.io/Statement/v1"
TEST_RESULT = "https://in-toto.io/attestation/test-result/v0.1"
ROBUSTNESS = "https://dfmcl.dev/attestation/robustness/v1"

VALID_DAYS = 90  # of an attestation, where the policy does not say
COPIED = (
    "verdict", "reasons", "statistics", "criteria", "created", "decided", "run", "code", "versions", "hardware",
    "processes",
)  # fmt: skip
MEASURED = ("threat", "grid", "seed", "images", "clean", "robust")
ABOUT_ATTACK = ("name", "parameters", "accuracy", "tried", "flipped", "outside")


def statements(report: Report, report_sha256: str, expires: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """The test result and the robustness statement. report_sha256: of report.json's bytes; expires: UTC, ISO 8601."""
    subject = subjects(report)
    return (
        _statement(subject, TEST_RESULT, test_result(report, report_sha256)),
        _statement(subject, ROBUSTNESS, robustness(report, report_sha256, expires)),
    )


def subjects(report: Report) -> dict[str, str]:
    """SHA-256 by name of what was judged: the files of a candidate, or the one thing that is no candidate."""
    candidate = report.candidate
    name = PurePath(candidate.name).name if KINDS[candidate.kind].file else candidate.name
    return dict(candidate.files) or {name: candidate.model_sha256}


def test_result(report: Report, report_sha256: str) -> dict[str, Any]:
    """The predicate that generic verifiers read. WARNED is not used: to them it means passed, with a warning."""
    tests = [(row.criterion, row.outcome == "met") for row in report.criteria]
    # A check that did not run neither passed nor failed.
    tests += [(row.check, row.outcome == "clear") for row in report.checks if row.outcome != "not_run"]
    digests = {
        "policy": report.policy.sha256,
        f"data {report.data.name}": report.data.sha256,
        "report.json": report_sha256,
        **report.files,
    }
    return {
        "result": "PASSED" if report.verdict == "passed" else "FAILED",
        "configuration": [{"name": name, "digest": {"sha256": digest}} for name, digest in digests.items()],
        "passedTests": [name for name, passed in tests if passed],
        "failedTests": [name for name, passed in tests if not passed],
    }


def robustness(report: Report, report_sha256: str, expires: str) -> dict[str, Any]:
    """The predicate in numbers: how much the model resists, on what, how it was found, and until when that counts."""
    return {
        **report.to_json(*COPIED),
        "expires": expires,
        "checks": {row.check: row.outcome for row in report.checks},
        "evaluation": _measured(report.evaluation),
        "radii": [_measured(evaluation) for evaluation in report.radii],
        "transfer": [_measured(evaluation) | evaluation.to_json("about") for evaluation in report.transfer],
        "policy": {"sha256": report.policy.sha256},
        "data": report.data.to_json("name", "sha256", "part", "images"),
        "report": {"sha256": report_sha256},
        "files": dict(report.files),
        "candidate": report.candidate.to_json("kind", "model_sha256", "input"),
    }


def expiry(report: Report, days: int) -> str:
    """When an attestation of this report expires: `days` after the gate ran, so that signing late prolongs nothing."""
    return (datetime.fromisoformat(report.created) + timedelta(days=days)).isoformat(timespec="seconds")


def _measured(evaluation: EvaluationEntry[Any]) -> dict[str, Any]:
    attacks = [attack.to_json(*ABOUT_ATTACK) for attack in evaluation.attacks]
    return {**evaluation.to_json(*MEASURED), "attacks": attacks}


def _statement(subject: Mapping[str, str], kind: str, predicate: dict[str, Any]) -> dict[str, Any]:
    return {
        "_type": STATEMENT,
        "subject": [{"name": name, "digest": {"sha256": digest}} for name, digest in sorted(subject.items())],
        "predicateType": kind,
        "predicate": predicate,
    }
