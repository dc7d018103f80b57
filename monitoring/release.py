"""What the gate measured on the release that is watched: the figures the live ones stand beside."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from gating.attestation import REPORT_FORMAT
from robustness.errors import BadInput
from robustness.files import read_json
from robustness.statistics import Share

REPORT = "report.json"
# Of a release; "missing" where the watch was given no evidence. The others are the gate's verdicts.
STATES = ("passed", "failed", "inconclusive", "suspect", "missing")


@dataclass(frozen=True)
class Attested:
    """The gate's report in numbers, at the policy's own radius. A threshold is None where it has no criterion there.

    checkpoint_sha256: of the run the release was exported from, "" where it came as a file; evaluated: unix seconds.
    """

    state: str
    checkpoint_sha256: str
    norm: str
    epsilon: str
    clean: Share
    robust: Share
    clean_threshold: float | None
    robust_threshold: float | None
    evaluated: float


def read_release(evidence: Path) -> Attested:
    """The report of an evidence directory (a promoted version holds one too); BadInput where it is none."""
    path = evidence / REPORT
    report = read_json(path)
    if report.get("format") != REPORT_FORMAT:
        raise BadInput(f"{path}: format is {report.get('format')!r}; expected {REPORT_FORMAT!r}")
    try:
        evaluation = report["evaluation"]
        attested = Attested(
            state=str(report["verdict"]),
            checkpoint_sha256=str(report["run"].get("checkpoint_sha256", "")),
            norm=str(evaluation["threat"]["norm"]),
            epsilon=str(evaluation["threat"]["label"]),
            clean=Share(int(evaluation["clean"]["k"]), int(evaluation["clean"]["n"])),
            robust=Share(int(evaluation["robust"]["k"]), int(evaluation["robust"]["n"])),
            clean_threshold=_strictest(report["criteria"], "clean_accuracy", evaluation["threat"]["label"]),
            robust_threshold=_strictest(report["criteria"], "robust_accuracy", evaluation["threat"]["label"]),
            evaluated=datetime.fromisoformat(report["created"]).timestamp(),
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        reason = f"lacks {error}" if isinstance(error, KeyError) else error
        raise BadInput(f"{path}: not a gate report ({reason}); run dfmcl gate again") from None
    if attested.state not in STATES or not all(
        0 <= share.k <= share.n and share.n for share in (attested.clean, attested.robust)
    ):
        raise BadInput(f"{path}: not a gate report (its verdict or counts are impossible); run dfmcl gate again")
    return attested


def _strictest(criteria: list[dict[str, object]], metric: str, radius: str) -> float | None:
    """Of the criteria about all classes at the policy's own radius, which need not be named."""
    own = [row for row in criteria if row["metric"] == metric and row["eps"] in (None, radius) and not row["class"]]
    thresholds = [float(str(row["threshold"])) for row in own]
    return max(thresholds, default=None)
