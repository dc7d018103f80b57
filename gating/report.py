"""The gate's report: one JSON document with a schema, and the same as a table that a person reads."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from gating.attestation import REPORT_FORMAT
from gating.policy import Policy
from gating.verdict import EXIT_CODES, Judgement

HEADLINES = {
    "passed": "PASSED: every criterion is met",
    "failed": "BLOCKED: the model misses a criterion",
    "suspect": "SUSPECT: the evidence cannot be believed",
    "inconclusive": "INCONCLUSIVE: more images are needed to decide",
}


def build_report(
    *,
    verdict: str,
    judgements: Sequence[Judgement],
    findings: Sequence[dict[str, str]],
    policy: Policy,
    candidate: dict[str, Any],
    run: dict[str, Any],
    data: dict[str, Any],
    evaluation: dict[str, Any],
    provenance: dict[str, Any],
    created: str,
    files: dict[str, str],
) -> dict[str, Any]:
    """report.json as `gating/report.schema.json` describes it."""
    return {
        "format": REPORT_FORMAT,
        "created": created,
        "verdict": verdict,
        "exit_code": EXIT_CODES[verdict],
        "criteria": [
            {
                "criterion": str(judgement.criterion),
                "metric": judgement.criterion.metric,
                "threshold": judgement.criterion.threshold,
                "confidence": judgement.criterion.confidence,
                "outcome": judgement.outcome,
                "k": judgement.share.k,
                "n": judgement.share.n,
                "value": judgement.share.value,
                "lower": judgement.lower,
                "upper": judgement.upper,
            }
            for judgement in judgements
        ],
        "findings": list(findings),
        "files": files,
        "policy": {**policy.model_dump(), "sha256": policy.digest},
        "candidate": candidate,
        "run": run,
        "data": data,
        "evaluation": evaluation,
        **provenance,
    }


def markdown(report: dict[str, Any]) -> str:
    """The report as a page: verdict first, then criteria, attacks and findings."""
    evaluation = report["evaluation"]
    lines = [
        f"### {HEADLINES[report['verdict']]}",
        "",
        f"Model `{report['candidate']['model_sha256'][:12]}`, policy `{report['policy']['sha256'][:12]}`,"
        f" {evaluation['images']} images of {report['data']['name']},"
        f" {evaluation['threat']['norm']} {evaluation['threat']['label']} as uint8.",
        "",
        "| criterion | measured | one-sided bounds | outcome |",
        "|---|---|---|---|",
    ]
    lines += [
        f"| {row['criterion']} | {100 * row['value']:.1f} % ({row['k']}/{row['n']})"
        f" | [{100 * row['lower']:.1f}, {100 * row['upper']:.1f}] % | {row['outcome']} |"
        for row in report["criteria"]
    ]
    lines += ["", "| attack, in order | tried | flipped | still right |", "|---|---|---|---|"]
    lines += [
        f"| {attack['name']} | {attack['tried']} | {attack['flipped']} | {100 * attack['accuracy']['value']:.1f} % |"
        for attack in evaluation["attacks"]
    ]
    if report["findings"]:
        lines += ["", "| check raised | why | what to do |", "|---|---|---|"]
        lines += [f"| {finding['check']} | {finding['why']} | {finding['do']} |" for finding in report["findings"]]
    return "\n".join(lines) + "\n"
