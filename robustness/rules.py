"""When the figures of a check raise it: pure functions, by which a check decides and a reader of its report again.

Figures are those of the report: `inf` and `nan` may stand there as text. KeyError where one lacks, ValueError where a
count is none.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from scipy.special import bdtrc

from dfmcl.robustness.statistics import lower_bound, upper_bound

Figures = Mapping[str, float | str]

STEPS, FEW_STEPS = 20, 5  # of PGD, and of the one that must not break more
BEYOND = 1.25  # of eps: how far random noise goes where an attack stays inside
SPREAD = 1e-3  # of the logits' deviation: sums in another order cost 1e-6 of it, noise that misleads an attack 1e-2
# Of one check, which divides it among its comparisons: all 13 that chance could raise do so in at most one run in 200
# together (Bonferroni).
LEVEL = 1 / 2600
CLEARLY = 0.05  # of the images that are right: a surplus below that does not carry a verdict, even where it is sure
# The cross-entropy at ten times the logits is nearly the margin, which breaks up to 4 points more of an honest model.
CLEARLY_BY_SCALE = 0.10
MOST_WAYS = 100  # that one check compares; no gate has so many attacks
PROBABILITY = 1e-4  # float32 sums a thousand probabilities to 1 within 1e-5
NO_GRADIENT = 0.05  # of the images: float32 has a gradient while the margin is below 88; of trained logits it is ~20
EXPLODED = 1e5  # nats that one grey level would cost by the gradient: undefended ImageNet networks reach some 1e2
MISLED = 0.5  # of the predicted change: ReLUs that change sides in between cost an honest gradient a few hundredths
# Of a change, left unexplained by gradients: honest networks leave at most 0.1 on any way, a switch 0.4 to 1.
UNEXPLAINED = 0.25
# Of the images may show one that is more: none of an honest network does.
UNACCOUNTED = 0.05
# Of the way from an even guess to certainty: hard adversarial training on few images ends at 0.04, a thousandth of
# ordinary logits at 0.0006. Accuracy goes at least FAR at the same time.
FLAT = 0.01
FAR = 0.25
UNLIMITED = 0.10  # of the images may survive an attack without limits: 20 steps are few
RISING = 0.15  # of the gain in the last quarter of the steps: a steady rise brings 0.25, one that ends 0.02 to 0.06
ENOUGH = 8  # images below which a median says nothing
# Of the images that white-box attacks left may fall to black-box ones and to PGD at another scale. APGD, Square: < 0.01
TOLERATED = 0.05
ROUNDED = 0.05  # of the images may be lost at the border where floats become bytes, and never be found again
DISAGREE = 0.01  # one rounding can tip a label at the border; a wrong export disagrees on far more
FRAGILE = 0.03  # of the images may flip by one grey level of noise; undefended ImageNet networks: below 0.01
REPEATED = 0.01  # of the images may also be training images: a few of every public data set are
# Less often right, or robust, on training images than on these, at least, and surely so: honest models are more so.
WORSE = 0.20
# Of the images may be lost to a light change that keeps their class. Plain networks on digits lose up to 0.1, one that
# tells a hundred pairs of digits apart 0.45 by a pixel; a memory loses nearly all but chance.
MOVED = 0.60


@dataclass(frozen=True)
class Ruling:
    """raised: whether figures raise the check; chance: the p that follows from their counts, None where none does."""

    raised: Callable[[Figures], bool]
    chance: Callable[[Figures], float | None] = lambda _: None


def counting(tolerated: float) -> Ruling:
    """Of a check that counts: raised where so many of so many are significantly more than tolerated."""

    def chance(f: Figures) -> float | None:
        return at_least(*_counted(f, "broken"), tolerated) if "broken" in f else None

    def raised(f: Figures) -> bool:
        ways = f.get("ways", 1)
        if not isinstance(ways, int) or not 1 <= ways <= MOST_WAYS:
            raise ValueError(f"{ways!r} is no number of ways that are compared")
        return at_least(*_counted(f, "broken"), tolerated) <= LEVEL / ways

    return Ruling(raised, chance)


def comparing(shares: int = 1) -> Ruling:
    """Of a check that compares two attacks: raised where the weaker alone breaks significantly and clearly more."""

    def chance(f: Figures) -> float | None:
        return coin(_counted(f, "only_weaker")[0], _counted(f, "only_stronger")[0]) if "only_stronger" in f else None

    def raised(f: Figures) -> bool:
        weaker, images = _counted(f, "only_weaker")
        if is_hopeless(weaker, images, shares):
            return False
        stronger, _ = _counted(f, "only_stronger")
        return coin(weaker, stronger) <= LEVEL / shares and weaker - stronger >= clearly(images, shares)

    return Ruling(raised, chance)


def clearly(images: int, shares: int) -> float:
    """The smallest surplus of so many images that carries a verdict."""
    return (CLEARLY_BY_SCALE if shares > 1 else CLEARLY) * images


def is_hopeless(weaker: int, images: int, shares: int) -> bool:
    """Whether so few that only the weaker attack broke can raise nothing, whatever the stronger one breaks."""
    return weaker < clearly(images, shares) or coin(weaker, 0) > LEVEL / shares


def coin(one: int, other: int) -> float:
    """The chance that a fair coin shows heads at least `one` times of one + other."""
    return float(bdtrc(one - 1, one + other, 0.5))


def at_least(k: int, n: int, share: float) -> float:
    """The chance of k or more of n at a share."""
    return float(bdtrc(k - 1, n, share))


def differs(f: Figures) -> bool:
    return not float(f["relative_to_spread"]) <= SPREAD


def are_probabilities(f: Figures) -> bool:
    return float(f["smallest_output"]) >= 0 and float(f["largest_distance_of_sum_from_1"]) <= PROBABILITY


def are_flat(f: Figures) -> bool:
    return float(f["mean_confidence_above_chance"]) < FLAT and float(f["accuracy_above_chance_lower_bound"]) > FAR


def have_no_use(f: Figures) -> bool:
    """Gradients that are not finite anywhere, zero on many images, or absurdly large."""
    (zero, images), (broken, _) = _counted(f, "zero"), _counted(f, "not_finite")
    return broken > 0 or zero > NO_GRADIENT * images or not float(f["largest"]) <= EXPLODED


def mislead(f: Figures) -> bool:
    return not MISLED <= float(f["median_happened_over_predicted"]) <= 1 / MISLED


def outlast(f: Figures) -> bool:
    held, images = _counted(f, "held")
    return held > UNLIMITED * images


def are_hidden(f: Figures) -> bool:
    """left: of the suite, where an attack in it that no scale misleads saw the images; missed: those of them that
    fell at another scale."""
    if not comparing(shares=2).raised(f):
        return False
    return "left" not in f or at_least(*_counted(f, "missed", "left"), TOLERATED) <= LEVEL


def still_rises(f: Figures) -> bool:
    images, _ = _counted(f, "images")
    return images >= ENOUGH and float(f["median_share_in_last_quarter"]) > RISING


def any_at_all(f: Figures) -> bool:
    return any(float(count) > 0 for count in f.values())


def were_seen(f: Figures) -> bool:
    """part: of the data that the model was trained on; trained_on: the parts of it that training saw."""
    if "copies" in f:
        return "images" not in f or _beyond(f, "copies")
    trained_on = str(f.get("trained_on", "train")).split(", ")
    return str(f["part"]) in trained_on or _beyond(f, "in_training")


def are_known_alone(f: Figures) -> bool:
    if "training" not in f:
        return counting(MOVED).raised(f)
    (right, images), (known, training) = _counted(f, "right"), _counted(f, "right_in_training", "training")
    return _surely_less((known, training), (right, images), LEVEL)


def resist_here_alone(f: Figures) -> bool:
    """Of training images that are right surely a smaller share holds, by much."""
    return _surely_less(_counted(f, "held_elsewhere", "elsewhere"), _counted(f, "held"), LEVEL)


def keeps_another(f: Figures) -> bool:
    changed, _ = _counted(f, "changed", "places")
    return changed > 0


def _surely_less(there: tuple[int, int], here: tuple[int, int], level: float) -> bool:
    """Whether of two counts (k, n) the first is the smaller share by WORSE at least, and surely smaller."""
    sure, (less, others), (more, images) = 1 - level / 2, there, here
    if not others or not images:
        return False
    apart = upper_bound(less, others, sure) < lower_bound(more, images, sure)
    return apart and more / images - less / others >= WORSE


def _beyond(f: Figures, key: str) -> bool:
    count, images = _counted(f, key)
    return count > REPEATED * images


def _counted(f: Figures, key: str, of: str = "images") -> tuple[int, int]:
    """Two counts, the first a part of the second."""
    k, n = f[key], f[of]
    if not isinstance(k, int) or not isinstance(n, int) or not 0 <= k <= n:
        raise ValueError(f"{key} {k!r} of {n!r} {of} is no count")
    return k, n
