"""The gate's report: one JSON document, `report.schema.json`, from which every other format is made."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gating.attestation import REPORT_FORMAT
from gating.policy import NO_REGRESSION, Criterion, Policy
from gating.verdict import EXIT_CODES, Judgement, Outcome, decide
from robustness.errors import BadInput
from robustness.files import read_json
from robustness.records import Evaluation

REPORT = "report.json"


def build_report(
    *,
    policy: Policy,
    judgements: Sequence[Judgement],
    comparison: Mapping[str, Any] | None,
    checks: Sequence[Mapping[str, Any]],
    why: Mapping[str, str],
    statistics: Mapping[str, Any],
    progress: Sequence[Mapping[str, Any]],
    subject: Mapping[str, Any],
    run: Mapping[str, Any],
    data: Mapping[str, Any],
    evaluations: Sequence[Evaluation],
    main: Evaluation,
    transfer: Sequence[Evaluation],
    per_image: Mapping[str, Any],
    files: Mapping[str, str],
    provenance: Mapping[str, Any],
    created: str,
) -> dict[str, Any]:
    """report.json, the verdict in it.

    why: the reasons why no evidence of this kind will do to pass, each with what is known of it ("": nothing more).
    comparison: what `baseline.compare` found; main: the one of `evaluations` at the policy's own radius.
    """
    rows = [criterion_row(judgement) for judgement in judgements]
    if comparison is not None:
        regressions = [criterion for criterion in policy.parsed_criteria if criterion.metric == NO_REGRESSION]
        among = len(judgements) + len(regressions)
        rows += [regression_row(criterion, comparison, among) for criterion in regressions]
        if (
            any(row["outcome"] == "open" for row in rows[len(judgements) :])
            and comparison["images"] == comparison["of"]
        ):
            why = {**why, "small_baseline": f"{comparison['held']} of {comparison['of']}"}
    findings = [{key: check[key] for key in ("check", "why", "do")} for check in checks if check["outcome"] == "raised"]
    verdict = decide([row["outcome"] for row in rows], findings, list(why))
    return {
        "format": REPORT_FORMAT,
        "created": created,
        "verdict": verdict,
        "exit_code": EXIT_CODES[verdict],
        "reasons": list(why),
        "why": dict(why),
        "statistics": dict(statistics),
        "criteria": rows,
        "progress": list(progress),
        "checks": list(checks),
        "findings": findings,
        "files": dict(files),
        "policy": {**policy.model_dump(), "sha256": policy.digest},
        "candidate": dict(subject),
        "run": dict(run),
        "data": dict(data),
        "evaluation": main.to_json(),
        "radii": [evaluation.to_json() for evaluation in evaluations if evaluation is not main],
        "transfer": [evaluation.to_json() for evaluation in transfer],
        "per_image": dict(per_image),
        "baseline": dict(comparison) if comparison is not None else None,
        **provenance,
    }


def read_report(evidence: Path) -> dict[str, Any]:
    """report.json of an evidence directory; BadInput where there is none."""
    path = evidence / REPORT
    report = read_json(path)
    if report.get("format") != REPORT_FORMAT or report.get("exit_code") != EXIT_CODES.get(str(report.get("verdict"))):
        raise BadInput(f"{path}: not a gate's report of format {REPORT_FORMAT}; run dfmcl gate again")
    return report


def criterion_row(judgement: Judgement) -> dict[str, Any]:
    """A claim as the report has it."""
    criterion = judgement.criterion
    return {
        "criterion": str(judgement.claim),
        "metric": criterion.metric,
        "eps": criterion.eps or None,
        "class": judgement.claim.class_name,
        "threshold": criterion.threshold,
        "confidence": criterion.confidence,
        "outcome": judgement.outcome,
        "decided_after": judgement.decided_after,
        "k": judgement.share.k,
        "n": judgement.share.n,
        "value": judgement.share.value if judgement.share.n else None,
        "lower": judgement.lower,
        "upper": judgement.upper,
    }


def regression_row(criterion: Criterion, comparison: Mapping[str, Any], among: int) -> dict[str, Any]:
    """`no_regression`: missed where chance would break so many more images in less than its share of the runs.

    The images are a fixed set, looked at once. Met says that no regression was shown, not that there is none; and it
    could have been: open where not all images were compared, and where the baseline held so few that losing every one
    would be chance. k of n images were not newly broken; there is no threshold, and no bounds.
    """
    images = int(comparison["images"])
    kept = images - int(comparison["only_baseline"])
    level = (1 - criterion.confidence) / among
    tested = images == comparison["of"] and 0.5 ** int(comparison["held"]) <= level
    outcome: Outcome = "missed" if comparison["p"] <= level else "met" if tested else "open"
    value = kept / images if images else None
    return {
        "criterion": str(criterion),
        "metric": criterion.metric,
        "eps": None,
        "class": None,
        "threshold": None,
        "confidence": criterion.confidence,
        "outcome": outcome,
        "decided_after": images or None,
        "k": kept,
        "n": images,
        "value": value,
        "lower": None,
        "upper": None,
    }
