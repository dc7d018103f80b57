"""What rounds of images prove about an accuracy as it is now, however often one looks.

The null p: in every round the accuracy was p or more. A gambler who believes in less stakes 1 at the start of *every*
round, each stake on that round and all later ones, and owns their sum: an e-detector (Shin, Ramdas & Rinaldo 2024,
"E-detectors", the Shiryaev-Roberts form). Old stakes know the whole past, young ones only what came after a change, so
that a late change is seen as quickly as an early one. Under the null the sum grows by 1 a round on average; less than
the number of rounds is a martingale from 0, so that it passes a limit c within N rounds with probability at most N / c
(Ville 1939). With c = N / risk that is `risk` for a month of looks, with nothing spared for a change that never comes.
What is rejected did happen; that it is over again shows some rounds later, as stakes are lost no faster than won.

A bet on s of n images right multiplies a stake by r^s / (1 - p (1 - r))^n, r < 1 an odds ratio: the likelihood ratio of
odds r times as high. n images of a round are drawn without replacement, which makes the sum of their outcomes no less
regular than coins (Hoeffding 1963), and rounds are drawn independently; so each factor is 1 or less on average whatever
the model answers, for every accuracy of p or more. It grows with p: what rejects p rejects all above, and the
smallest p that is rejected is the upper bound. The lower one is that of the failures, turned round.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

MONTH_SECONDS = 30 * 24 * 3600.0
RISK = 0.01  # of a false page in a month, all bounds of a watch together
# Odds ratios believed in, 2 to 28 points below one half. Nine cost log 9 of log-wealth at most, and neighbours win
# together; the same range decides in the gate (robustness/sequential.py).
RATIOS: Floats = np.exp(-0.08 * 2 ** (np.arange(9) / 2))
# A gambler stops at so many times what rejects: a model that is well again must not wait as long as it was not.
ENOUGH = 10.0
GRID: Floats = np.linspace(0, 1, 501)  # accuracies that are tested; a bound is rounded outwards to the next one


def limit(rounds: float, bounds: int, risk: float = RISK) -> float:
    """How much must be won: `bounds` of them, looked at in `rounds` rounds, are ever wrong with probability `risk`."""
    return max(rounds, 1.0) * bounds / risk


@dataclass(frozen=True)
class Bounds:
    """Two-sided bounds of an accuracy after any number of rounds; each new round replaces them.

    limit: see above. below, above: log of what each bet owns, `(len(GRID), len(RATIOS))`, against accuracies of the
    grid or more, and of one less the grid or less.
    """

    limit: float
    below: Floats
    above: Floats

    @staticmethod
    def none(limit: float) -> Bounds:
        """Before the first round: nothing is known."""
        nothing = np.full((len(GRID), len(RATIOS)), -np.inf)
        return Bounds(limit, nothing, nothing)

    def after(self, right: int, images: int) -> Bounds:
        """With a round in which `right` of `images` were right; one of no images changes nothing."""
        if not images:
            return self
        below = bet(self.below, right, images, PRICES, self.limit)
        return replace(self, below=below, above=bet(self.above, images - right, images, PRICES, self.limit))

    @property
    def upper(self) -> float:
        """The accuracy is no higher now, or the model was unlucky as it is once in 1 / RISK months."""
        return _least_rejected(self.below, self.limit)

    @property
    def lower(self) -> float:
        """The accuracy is no lower now."""
        return 1 - _least_rejected(self.above, self.limit)


def after_all(bounds: Bounds, rounds: Iterable[tuple[int, int]]) -> Bounds:
    """With many rounds (right, images), one after another."""
    for right, images in rounds:
        bounds = bounds.after(right, images)
    return bounds


def prices(accuracies: Floats) -> Floats:
    """Log of what a bet pays on average for an image of accuracy `(P,)`: what it costs, `(P, len(RATIOS))`."""
    return np.asarray(np.log1p(-accuracies[:, None] * (1 - RATIOS)))


PRICES = prices(GRID)


def bet(owned: Floats, successes: int | Floats, images: int, prices: Floats, limit: float) -> Floats:
    """Log of what is owned after a round: everything that was, and a new stake, bet on it, `(..., P, len(RATIOS))`."""
    won = np.logaddexp(owned, 0.0) + successes * np.log(RATIOS) - images * prices
    return np.asarray(np.minimum(won, np.log(limit * len(RATIOS) * ENOUGH)))


def rejected(owned: Floats, limit: float) -> NDArray[np.bool_]:
    """Which accuracies `(..., P)` the model cannot have."""
    won = np.logaddexp.reduce(owned, axis=-1) - np.log(len(RATIOS))
    return np.asarray(won >= np.log(limit))


def _least_rejected(owned: Floats, limit: float) -> float:
    places = np.flatnonzero(rejected(owned, limit))
    return float(GRID[places[0]]) if len(places) else 1.0
