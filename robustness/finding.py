"""What a check says, and when a comparison of two attacks, or a count, is sure enough to be said."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

from scipy.special import bdtr, bdtrc

from dfmcl.robustness.diagnosis import Examination

Figures = Mapping[str, float | str]

COMPARISONS = 12  # checks that chance could raise; one that makes several comparisons divides its level
LEVEL = 1 / 2400  # of one check: all of them together raise one by chance in at most one run in 200 (Bonferroni)
CLEARLY = 0.05  # of the images that are right: a surplus below that does not carry a verdict, even where it is sure
# The cross-entropy at ten times the logits is nearly the margin, which breaks up to 4 points more of an honest model.
CLEARLY_BY_SCALE = 0.10
MISSED = 0.05  # chance that a look ends a count that would have been significant in half of the cases: costs below 0.03


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
    needed = (CLEARLY_BY_SCALE if shares > 1 else CLEARLY) * n
    figures: dict[str, float | str] = {"only_weaker": only_weaker, "images": n}
    why = f"{weaker} alone breaks {only_weaker} of {n} images"
    if only_weaker < needed or _coin(only_weaker, 0) > LEVEL / shares:
        return Found("clear", f"{why}, too few to tell", figures)
    others = only_stronger()
    p = _coin(only_weaker, others)
    raised = p <= LEVEL / shares and only_weaker - others >= needed
    why = f"{why}, {stronger} alone breaks {others}"
    return Found("raised" if raised else "clear", why, figures | {"only_stronger": others, "p": p})


def _coin(one: int, other: int) -> float:
    """The chance that a fair coin shows heads at least `one` times of one + other."""
    return float(bdtrc(one - 1, one + other, 0.5))


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


def hopeless(k: int, n: int, of: int, tolerated: float, ways: int) -> bool:
    """Whether k of the first n images are so few that the other ones of all `of` can be left out.

    A share that all of them show in half of all runs (`too_many`, one of `ways`) would show so few in fewer than MISSED
    of them; a larger share in fewer still. So a count that ends here loses next to nothing of what it finds.
    """
    enough = next((k for k in range(1, of + 1) if bdtrc(k - 1, of, tolerated) <= LEVEL / ways), of)
    return bool(bdtr(k, n, enough / of) < MISSED)


def first_look(of: int, tolerated: float, ways: int) -> int:
    """After how many images, of all `of`, a count of none is hopeless; all, where it never is."""
    return next((n for n in range(1, of) if hopeless(0, n, of, tolerated, ways)), of)
