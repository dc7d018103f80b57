"""What a check says, and when a comparison of two attacks, or a count, is sure enough to be said."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

from scipy.special import bdtrc

from dfmcl.robustness.diagnosis import Examination
from dfmcl.robustness.statistics import Flags, PairedCounts

Figures = Mapping[str, float | str]

COMPARISONS = 12  # checks that chance could raise; one that makes several comparisons divides its level
LEVEL = 1 / 2400  # of one check: all of them together raise one by chance in at most one run in 200 (Bonferroni)
CLEARLY = 0.05  # of the images that are right: a surplus below that does not carry a verdict, even where it is sure
# The cross-entropy at ten times the logits is nearly the margin, which breaks up to 4 points more of an honest model.
CLEARLY_BY_SCALE = 0.10


@dataclass(frozen=True)
class Found:
    """What a check found."""

    outcome: Literal["clear", "raised", "not_run"]
    why: str
    figures: Figures = field(default_factory=dict)


@dataclass(frozen=True)
class Check:
    """when: it is raised, as a sentence's end; do: what helps; needs: the facts without which it does not run."""

    name: str
    when: str
    do: str
    run: Callable[[Examination], Found]
    needs: tuple[Literal["gradients", "images", "record"], ...] = ()


def surplus(weaker: str, by_weaker: Flags, stronger: str, by_stronger: Flags, shares: int = 1) -> Found:
    """Raised where the weaker attack breaks more: p is that of a fair coin for each image that only one broke.

    shares: comparisons that share the check's level.
    """
    counts = PairedCounts.of(by_weaker, by_stronger)
    only_weaker, only_stronger, n = counts.only_first, counts.only_second, len(by_weaker)
    p = float(bdtrc(only_weaker - 1, only_weaker + only_stronger, 0.5))
    needed = (CLEARLY_BY_SCALE if shares > 1 else CLEARLY) * n
    raised = p <= LEVEL / shares and only_weaker - only_stronger >= needed
    why = f"{weaker} alone breaks {only_weaker} of {n} images, {stronger} alone breaks {only_stronger}"
    figures = {"only_weaker": only_weaker, "only_stronger": only_stronger, "images": n, "p": p}
    return Found("raised" if raised else "clear", why, figures)


def too_many(ways: Mapping[str, tuple[int, int]], said: str, tolerated: float) -> Found:
    """Raised where k of n is significantly more than tolerated, in the worst of several ways (k, n)."""
    ways = {way: counts for way, counts in ways.items() if counts[1]}
    if not ways:
        return Found("not_run", "there was nothing left to compare")
    p = {way: float(bdtrc(k - 1, n, tolerated)) for way, (k, n) in ways.items()}
    worst = min(ways, key=lambda way: (p[way], -ways[way][0] / ways[way][1]))
    k, n = ways[worst]
    raised = p[worst] <= LEVEL / len(ways)
    why = f"{worst}: {said}, {k} of {n}"
    return Found("raised" if raised else "clear", why, {"broken": k, "images": n, "p": p[worst], "way": worst})
