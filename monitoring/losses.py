"""When robustness is lost for certain: facts, and bounds that are wrong once in a hundred months."""

from __future__ import annotations

from monitoring.journal import VersionTotals
from monitoring.release import Attested

# integrity: a recorded answer came out differently. The others: even the upper bound of a live figure is below what the
# gate's policy asks for, or below the lower bound of what the gate measured.
LOSSES = ("integrity", "threshold", "transfer", "clean")


def losses(
    totals: VersionTotals, attested: Attested | None, norm: str, epsilon: str, surrogates: str
) -> frozenset[str]:
    """Which losses are proven now. norm, epsilon: the watch's ball; surrogates: SHA-256 of those it crafts on."""
    found = {"integrity"} if totals.integrity is False else set()
    if attested is None:
        return frozenset(found)
    upper = {name: bounds.upper for name, bounds in totals.bounds.items()}
    if upper.get("clean", 1.0) < max(attested.clean.bounds[0], attested.clean_threshold or 0.0):
        found.add("clean")
    if (attested.norm, attested.epsilon) == (norm, epsilon):
        # Live figures are upper bounds of robust accuracy: what is below the threshold here is so under every attack.
        if upper.get("worst_case", 1.0) < (attested.robust_threshold or 0.0):
            found.add("threshold")
        for (source, attack), share in attested.transfer.items():
            if source == surrogates and upper.get(attack, 1.0) < share.bounds[0]:
                found.add("transfer")
    return frozenset(found)
