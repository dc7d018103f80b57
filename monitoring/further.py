"""The page's lines about further threats, such as patches and corruptions: nobody crafts new ones in production.

A watch asks about the gate's own images of them, and counts the answers that the gate recorded.
"""

from __future__ import annotations

from html import escape

from dfmcl.monitoring.journal import VersionTotals
from dfmcl.monitoring.releases import Attested


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
