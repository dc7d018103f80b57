"""When robustness is lost for certain: facts, and bounds that are wrong once in a hundred months."""

from __future__ import annotations

from collections.abc import Mapping

from dfmcl.monitoring.bounds import RISK
from dfmcl.monitoring.journal import VersionTotals
from dfmcl.monitoring.releases import Attested
from dfmcl.robustness.statistics import Share, lower_bound

# integrity: a recorded answer came out differently. The others: over some of the last rounds the mean of a live figure
# is below the gate's policy, or below what the gate measured, less what its few images may have been lucky by. Not over
# the whole window: its youngest rounds prove a loss before it is cut (`make bench-bounds`).
LOSSES = ("integrity", "threshold", "transfer", "clean")


def bars(
    attested: Attested,
    norm: str,
    epsilon: str,
    surrogates: str,
    attacks: Mapping[str, tuple[str, str] | tuple[()]],
) -> dict[tuple[str, str], float]:
    """By (loss, live figure): the accuracy below which that loss is proven, once the figure's stretch_upper is there.

    attested: by the gate.
    norm, epsilon: the watch's ball.
    surrogates: SHA-256 of those it crafts on.
    attacks: all of the watch, by name: kind and label of its own threat, () for the ball.
    """
    gated = {attack: share for (source, attack), share in attested.transfer.items() if source == surrogates}

    def measured(share: Share) -> float:
        """The gate's lower bounds are wrong once in 1 / RISK versions, all together; 95 % would page for good luck."""
        return lower_bound(share.k, share.n, 1 - RISK / (1 + len(gated)))

    found = {("clean", "clean"): max(measured(attested.clean), attested.clean_threshold or 0.0)}
    ours = [name for name, threat in attacks.items() if not threat]
    if (attested.norm, attested.epsilon) == (norm, epsilon):
        # Live figures are upper bounds of robust accuracy: what is below the threshold here is so under every attack.
        if attested.robust_threshold is not None:
            found |= {("threshold", figure): attested.robust_threshold for figure in ("worst_case", *ours)}
        found |= {("transfer", attack): measured(share) for attack, share in gated.items()}
    # A random member, or the surrogates' patch, is no worse than the worst member: upper bounds, too.
    asked = attested.further_thresholds
    return found | {
        ("threshold", name): asked[threat] for name, threat in attacks.items() if threat and threat in asked
    }


def losses(totals: VersionTotals, bars: Mapping[tuple[str, str], float]) -> frozenset[str]:
    """Which losses are proven now. bars: of the version's gate; none where nothing is known of it."""
    upper = {figure: bounds.stretch_upper for figure, bounds in totals.bounds.items()}
    proven = {loss for (loss, figure), bar in bars.items() if upper.get(figure, 1.0) < bar}
    return frozenset(proven | ({"integrity"} if totals.integrity is False else set()))
