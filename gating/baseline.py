"""No regression: the same images, a model before and a model after, and which images the new one newly loses."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from dfmcl.common.errors import BadInput
from dfmcl.gating.pairs import Pairs
from dfmcl.gating.policy import Policy
from dfmcl.gating.signing.evidence import read_report
from dfmcl.gating.signing.faults import EvidenceError
from dfmcl.gating.soundness import require_derived
from dfmcl.robustness.records import from_bits


@dataclass(frozen=True)
class Baseline:
    """What an earlier report says of each image, by its position in the data set."""

    report_sha256: str
    model_sha256: str
    index: tuple[int, ...]
    held: tuple[bool, ...]

    @staticmethod
    def read(path: Path, policy: Policy, data_sha256: str, population: int) -> Baseline:
        """From a report.json; BadInput where it is none, or its images were met by another threat or other attacks.

        What the report says must follow from its own record. population: how many images the data set has.
        """
        try:
            report, digest = read_report(path)
            require_derived(report, path)
        except EvidenceError as error:
            raise BadInput(f"--baseline {error}") from None
        asked, data = report.policy, report.data
        for name, ours, theirs in (
            ("threat", policy.threat, asked.threat),
            ("attacks", policy.attacks.suite, asked.attacks.suite),
            ("whole suite", policy.attacks.whole, asked.attacks.whole),
            ("data", (data_sha256, population), (data.sha256, data.images)),
        ):
            if ours != theirs:
                raise BadInput(f"--baseline {path}: was made with other {name}; gate that model by this policy first")
        return Baseline(
            report_sha256=digest,
            model_sha256=report.candidate.model_sha256,
            index=report.per_image.index,
            held=from_bits(report.evaluation.per_image.robust),
        )


def compare(baseline: Baseline, held: Mapping[int, bool]) -> Pairs:
    """Both models on the baseline's images that `held` knows."""
    known = [pair for pair in zip(baseline.index, baseline.held, strict=True) if pair[0] in held]
    return Pairs(
        baseline.report_sha256,
        baseline.model_sha256,
        of=len(baseline.index),
        index=tuple(index for index, _ in known),
        before=tuple(before for _, before in known),
        after=tuple(held[index] for index, _ in known),
    )
