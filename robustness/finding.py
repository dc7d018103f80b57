"""What a check says, and when a comparison of two attacks, or a count, is sure enough to be said."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

from scipy.special import bdtr

from dfmcl.robustness.diagnosis import Examination
from dfmcl.robustness.reasons import Reason
from dfmcl.robustness.rules import LEVEL, Figures, at_least, coin, comparing, counting, is_hopeless

MISSED = 0.05  # chance that a look ends a count that would have been significant in half of the cases: costs below 0.03


@dataclass(frozen=True)
class Found:
    """What a check found."""

    outcome: Literal["clear", "raised", "not_run"]
    why: str
    figures: Figures = field(default_factory=dict)

    @staticmethod
    def by(raised: Callable[[Figures], bool], why: str, figures: Figures) -> Found:
        """Raised or clear, as a rule has it."""
        return Found("raised" if raised(figures) else "clear", why, figures)


@dataclass(frozen=True, kw_only=True)
class Check(Reason):
    """A reason, and the question that finds its figures."""

    run: Callable[[Examination], Found]


def surplus(
    weaker: str, stronger: str, only_weaker: int, only_stronger: Callable[[], int], n: int, shares: int = 1
) -> Found:
    """Raised where the weaker attack breaks more: p is that of a fair coin for each image that only one broke.

    weaker, stronger: their names.
    only_weaker: images that only the weaker broke.
    only_stronger: counts the others; not asked where the first count alone is too small to raise anything.
    n: images that are right.
    shares: comparisons that share the check's level.
    """
    figures: dict[str, float | str] = {"only_weaker": only_weaker, "images": n}
    why = f"{weaker} alone breaks {only_weaker} of {n} images"
    rule = comparing(shares).raised
    if is_hopeless(only_weaker, n, shares):
        return Found.by(rule, f"{why}, too few to tell", figures)
    others = only_stronger()
    figures |= {"only_stronger": others, "p": coin(only_weaker, others)}
    return Found.by(rule, f"{why}, {stronger} alone breaks {others}", figures)


def too_many(ways: Mapping[str, tuple[int, int]], said: str, tolerated: float) -> Found:
    """Raised where k of n is significantly more than tolerated, in the worst of several ways (k, n)."""
    ways = {way: counts for way, counts in ways.items() if counts[1]}
    if not ways:
        return Found("not_run", "there was nothing left to compare")
    p = {way: at_least(k, n, tolerated) for way, (k, n) in ways.items()}
    worst = min(ways, key=lambda way: (p[way], -ways[way][0] / ways[way][1]))
    k, n = ways[worst]
    figures: Figures = {"broken": k, "images": n, "p": p[worst], "way": worst, "ways": len(ways)}
    return Found.by(counting(tolerated).raised, f"{worst}: {said}, {k} of {n}", figures)


def hopeless(k: int, n: int, of: int, tolerated: float, ways: int) -> bool:
    """Whether k of the first n images are so few that the other ones of all `of` can be left out.

    A share that all of them show in half of all runs (`too_many`, one of `ways`) would show so few in fewer than MISSED
    of them; a larger share in fewer still. So a count that ends here loses next to nothing of what it finds.
    """
    enough = next((k for k in range(1, of + 1) if at_least(k, of, tolerated) <= LEVEL / ways), of)
    return bool(bdtr(k, n, enough / of) < MISSED)


def first_look(of: int, tolerated: float, ways: int) -> int:
    """After how many images, of all `of`, a count of none is hopeless; all, where it never is."""
    return next((n for n in range(1, of) if hopeless(0, n, of, tolerated, ways)), of)
