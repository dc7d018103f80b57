"""The page's words about threats of other kinds than the watch's ball, such as patches and corruptions.

A watch asks about new images under those that its config names, and about the gate's own images of all of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from html import escape

from dfmcl.monitoring.journal import VersionTotals
from dfmcl.monitoring.releases import Attested
from dfmcl.monitoring.snapshot import AttackInfo, Identity
from dfmcl.robustness.statistics import Share


def further(totals: VersionTotals, attested: Attested | None) -> str:
    """HTML: a line for each kind whose images were asked about again, "" where there is none.

    attested: what the gate found under them, where it is known; of several of a kind the lowest and the highest.
    """
    lines = []
    for part in totals.further.values():
        own = [(label, share) for kind, label, share in attested.further if kind == part.kind] if attested else []
        named = f"{part.kind}, {len(own)} threats" if len(own) > 1 else " ".join([part.kind, *(one for one, _ in own)])
        values = sorted(share.value for _, share in own)
        held = " to ".join(f"{100 * value:.1f} %" for value in values[:: len(values) - 1]) if len(values) > 1 else ""
        if len(own) == 1:
            held = str(own[0][1])
        lines.append(
            f"<li>{escape(named)}: asked about {part.images} times, answered as recorded "
            f"{part.images - part.mismatches} times{f'; accuracy under it at the gate {held}' if held else ''}."
        )
    return f"<p>Among them, images of further threats:</p><ul>{''.join(lines)}</ul>" if lines else ""


def how(attack: AttackInfo) -> str:
    """How an attack finds its images."""
    if attack.surrogate:
        return "transfer"
    return "drawn" if attack.threat else "query"


def gated_threats(identity: Identity, attested: Attested) -> Iterator[tuple[str, Share, float | None]]:
    """Of the threats that the watch asks and the gate measured: name, the gate's worst case, and what is asked for."""
    shares = {(kind, label): share for kind, label, share in attested.further}
    for attack in identity.attacks:
        if attack.threat in shares:
            yield attack.name, shares[attack.threat], attested.further_thresholds.get(attack.threat)
