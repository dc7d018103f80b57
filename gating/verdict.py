"""From counts to a verdict. Pure arithmetic; the exit codes are a stable interface."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from gating.policy import Criterion
from robustness.statistics import Share, lower_bound, upper_bound

EXIT_CODES = {"passed": 0, "failed": 1, "inconclusive": 3, "suspect": 4}


@dataclass(frozen=True)
class Judgement:
    """One criterion against what was counted: met, missed, or open where the bounds straddle the threshold."""

    criterion: Criterion
    share: Share
    lower: float
    upper: float

    @property
    def outcome(self) -> str:
        if self.lower >= self.criterion.threshold:
            return "met"
        return "missed" if self.upper < self.criterion.threshold else "open"

    def __str__(self) -> str:
        return (
            f"{self.criterion}: {self.outcome}, measured {self.share.value:.4f} ({self.share.k} of {self.share.n}),"
            f" one-sided bounds {self.lower:.4f} and {self.upper:.4f}"
        )


def judge(criterion: Criterion, share: Share) -> Judgement:
    """Exact one-sided Clopper-Pearson bounds, each at the criterion's confidence."""
    lower = lower_bound(share.k, share.n, criterion.confidence)
    upper = upper_bound(share.k, share.n, criterion.confidence)
    return Judgement(criterion, share, lower, upper)


def decide(judgements: Sequence[Judgement], findings: Sequence[Mapping[str, str]]) -> str:
    """The verdict: failed before suspect before inconclusive before passed.

    Failed where any criterion is certainly missed: an adversarial image that was found is a fact, however suspect the
    rest. Suspect where any check was raised. To pass, every criterion must be met; as all must, no correction for
    their number is needed: a model that misses one of them passes with probability at most 1 - its confidence.
    """
    outcomes = {judgement.outcome for judgement in judgements}
    if "missed" in outcomes:
        return "failed"
    if findings:
        return "suspect"
    return "inconclusive" if "open" in outcomes else "passed"
