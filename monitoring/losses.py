"""When robustness is lost for certain: facts, and bounds that are wrong once in a hundred months."""

from __future__ import annotations

from monitoring.bounds import RISK
from monitoring.journal import VersionTotals
from monitoring.release import Attested
from robustness.statistics import Share, lower_bound

# integrity: a recorded answer came out differently. The others: even the upper bound of a live figure is below what the
# gate's policy asks for, or below what the gate measured, less what its few images may have been lucky by.
LOSSES = ("integrity", "threshold", "transfer", "clean")


def losses(
    totals: VersionTotals, attested: Attested | None, norm: str, epsilon: str, surrogates: str
) -> frozenset[str]:
    """Which losses are proven now. norm, epsilon: the watch's ball; surrogates: SHA-256 of those it crafts on."""
    found = {"integrity"} if totals.integrity is False else set()
    if attested is None:
        return frozenset(found)
    upper = {name: bounds.upper for name, bounds in totals.bounds.items()}
    gated = [attack for source, attack in attested.transfer if source == surrogates]

    def measured(share: Share) -> float:
        """The gate's lower bounds are wrong once in 1 / RISK versions, all together; 95 % would page for good luck."""
        return lower_bound(share.k, share.n, 1 - RISK / (1 + len(gated)))

    if upper.get("clean", 1.0) < max(measured(attested.clean), attested.clean_threshold or 0.0):
        found.add("clean")
    if (attested.norm, attested.epsilon) == (norm, epsilon):
        # Live figures are upper bounds of robust accuracy: what is below the threshold here is so under every attack.
        if upper.get("worst_case", 1.0) < (attested.robust_threshold or 0.0):
            found.add("threshold")
        if any(upper.get(attack, 1.0) < measured(attested.transfer[surrogates, attack]) for attack in gated):
            found.add("transfer")
    return frozenset(found)
