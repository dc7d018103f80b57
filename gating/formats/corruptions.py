"""Accuracy under corruptions as a table: a row for each kind, a column for each severity."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from dfmcl.gating.signing.evaluation import ShareEntry
from dfmcl.gating.signing.report import Report
from dfmcl.robustness.corruptions.severities import LEVELS
from dfmcl.robustness.threats.corruption import Corruption


@dataclass(frozen=True)
class CorruptionRow:
    """One kind of corruption: the share still right at each of the severities LEVELS, None where it was not asked."""

    kind: str
    shares: tuple[float | None, ...]
    mean: float


def corruption_rows(report: Report) -> list[CorruptionRow]:
    """The kinds of corruption that were asked about, in their order, with their mean accuracies."""
    found: dict[str, dict[int, ShareEntry]] = {}
    for one in report.radii:
        if isinstance(threat := one.threat.parsed, Corruption):
            found.setdefault(threat.corruption, {})[threat.severity] = one.robust
    return [
        CorruptionRow(kind, tuple(shares[level].value if level in shares else None for level in LEVELS), _mean(shares))
        for kind, shares in found.items()
    ]


def _mean(shares: Mapping[int, ShareEntry]) -> float:
    return float(np.mean([share.value for share in shares.values()]))
