"""No regression: the same images, a model before and a model after, and which images the new one newly loses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
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
    """What an earlier report says of each image, by its position in the data set.

    others: in the further threats that are compared, by their names.
    """

    report_sha256: str
    model_sha256: str
    index: tuple[int, ...]
    held: tuple[bool, ...]
    others: Mapping[str, tuple[bool, ...]] = field(default_factory=dict)

    @staticmethod
    def read(path: Path, policy: Policy, data_sha256: str, population: int, grid: bool) -> Baseline:
        """From a report.json; BadInput where it is none, or its images were met by another threat or other attacks.

        What the report says must follow from its own record. population: how many images the data set has; grid:
        whether adversarial images count as bytes.
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
        met = {
            str(threat): from_bits(one.per_image.robust)
            for one in report.radii
            for threat in [one.threat.parsed]
            if policy.attacks.by_kind(threat.kind) == asked.attacks.by_kind(threat.kind)
        }
        needed, wished = policy.regressed(grid), policy.spoiled
        if missing := [name for name in needed if name not in met]:
            raise BadInput(
                f"--baseline {path}: was not made under {missing[0]} by the same attacks; gate that model by this"
                " policy first"
            )
        names = dict.fromkeys([*needed, *(wished if met.keys() >= {*wished} else ())])
        return Baseline(
            report_sha256=digest,
            model_sha256=report.candidate.model_sha256,
            index=report.per_image.index,
            held=from_bits(report.evaluation.per_image.robust),
            others={name: met[name] for name in names},
        )


def compare(baseline: Baseline, held: Mapping[str, Mapping[int, bool]]) -> Pairs:
    """Both models on the baseline's images that `held` knows, by the names of threats; "": the policy's own."""
    known = [(row, index) for row, index in enumerate(baseline.index) if index in held[""]]

    def both(name: str, before: Sequence[bool]) -> tuple[tuple[bool, ...], tuple[bool, ...]]:
        return tuple(before[row] for row, _ in known), tuple(held[name][index] for _, index in known)

    before, after = both("", baseline.held)
    return Pairs(
        baseline.report_sha256,
        baseline.model_sha256,
        of=len(baseline.index),
        index=tuple(index for _, index in known),
        before=before,
        after=after,
        others={name: both(name, flags) for name, flags in baseline.others.items()},
    )
