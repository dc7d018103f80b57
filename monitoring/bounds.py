"""What rounds of images prove about the mean accuracy of a stretch of rounds that ends now, however often one looks.

No bound is about this round alone: a round has too few images, and older ones say nothing of it unless something is
assumed. So each bound here is about a mean, and holds whatever the accuracy does: fall, rise, drift or alternate, also
in answer to what was seen.

Why. A gambler stakes 1 at the start of *every* round and bets that stake on this round and all later ones. A bet on s
of n images right multiplies it by r^s / (1 - p (1 - r))^n, r < 1 an odds ratio. The images of a round are drawn without
replacement and independently of the past, so that r^s is on average (1 - q (1 - r))^n at the most, q the round's
accuracy (Hoeffding 1963): priced with the true q of each round, no stake grows on average, and the sum of all stakes
grows by at most 1 a round. Such a sum reaches c within N rounds with probability at most N / c (Ville 1939; an
e-detector in the form of Shiryaev & Roberts: Shin, Ramdas & Rinaldo 2024). Assume that it does not. log(1 - q (1 - r))
is concave in q, so that a stake which is priced with one accuracy p, no more than the mean of its images, never owns
more than with the true prices (Jensen). Therefore, for all stretches of all rounds at once,

* a stake that owns c against p by itself proves: the mean accuracy since its start is below p;
* stakes that own c against p together prove: since the start of one of them, the mean accuracy is below p.

What rejects p rejects all above it; the smallest p is found by bisection. Failures, turned round, give lower bounds.
At the share p that was seen no stake has won (Jensen again), so that lower < share < upper for every stretch.

Assumed: one model answers all of a round; whether a round counts does not depend on its answers (one that fails halfway
is dropped); and each round is drawn anew. Figures of one round may share its images: each has its own part of the risk.
Each new version begins with stakes of its own, so that the risk is that of a month and a version.

Which stretch is published is a choice, and no choice can make it wrong. Here it is the longest that shows no change:
windows are grown as long as no cut divides one into parts that differ (as ADWIN does: Bifet & Gavalda 2007).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
from numpy.typing import NDArray
from scipy.special import xlogy

Floats = NDArray[np.float64]
Counts = NDArray[np.int64]

MONTH_SECONDS = 30 * 24 * 3600.0
RISK = 0.01  # of a false bound in a month, all bounds of a watch together
LONGEST = (
    8192  # rounds that are kept: six days of one a minute, after which 32 images a round leave 0.6 points on each side
)
# Odds ratios believed in: 0.5 points below one half, which 8192 rounds of 128 images show, to what one round may show.
# Eight cost log 8 of log-wealth at most, and neighbours win together.
RATIOS: Floats = np.exp(-0.02 * 2.0 ** np.arange(8))
# Of windows that are compared, in rounds: after a change the published one is 0.7 of the best possible or more.
WINDOWS: Counts = np.unique(np.round(2 ** (np.arange(27) / 2)).astype(np.int64))
# Two parts differ where two accuracies explain them exp(10) times as well as one: 4.5 standard errors. That divides a
# steady model's window in 3 of 10,000 rounds; less would oftener, more sees a change later; bounds hold either way.
EVIDENCE = 10.0
STEPS = 16  # of the bisection: two in 100,000, rounded outwards


def limit(rounds: float, bounds: int, risk: float = RISK) -> float:
    """How much must be won: `bounds` of them, looked at in `rounds` rounds, are ever wrong with probability `risk`.

    Stakes from before those rounds, LONGEST at most, count too: it is so for every month, and not for the first alone.
    """
    return (max(rounds, 1.0) + LONGEST) * bounds / risk


@dataclass(frozen=True)
class Bounds:
    """Of a mean accuracy, after any number of rounds; each new round replaces them.

    limit: see above. right, images, started: of the last rounds, LONGEST at most, oldest first, `(R,)`; started: unix
    seconds.
    """

    limit: float
    right: Counts = field(default_factory=lambda: np.zeros(0, np.int64))
    images: Counts = field(default_factory=lambda: np.zeros(0, np.int64))
    started: Floats = field(default_factory=lambda: np.zeros(0))

    def after(self, right: int, images: int, started: float) -> Bounds:
        """With a round in which `right` of `images` were right; one of no images changes nothing."""
        if not images:
            return self
        return replace(
            self,
            right=np.concatenate([self.right[1 - LONGEST :], [right]]),
            images=np.concatenate([self.images[1 - LONGEST :], [images]]),
            started=np.concatenate([self.started[1 - LONGEST :], [started]]),
        )

    @cached_property
    def rounds(self) -> int:
        """How many of the last rounds the bounds are about: the longest window that shows no change; 0 before any."""
        if not len(self.right):
            return 0
        windows = windows_of(len(self.right))
        right, images = (counts[windows - 1] for counts in self._since)
        return int(windows[undivided(right, images)])

    @property
    def start(self) -> float:
        """When the first of these rounds began, unix seconds; 0 before any."""
        return float(self.started[-self.rounds]) if self.rounds else 0.0

    @property
    def upper(self) -> float:
        """The mean accuracy over the last `rounds` rounds is below this (or 1)."""
        return float(self._ends[0])

    @property
    def lower(self) -> float:
        """The mean accuracy over the last `rounds` rounds is above this (or 0)."""
        return 1 - float(self._ends[1])

    @cached_property
    def stretch_upper(self) -> float:
        """Over the last rounds, some number of them and `rounds` at most, the mean accuracy is below this (or 1)."""
        if not self.rounds:
            return 1.0
        right, images = (counts[: self.rounds] for counts in self._since)
        return float(least_rejected(right, images, self.limit))

    @cached_property
    def _ends(self) -> Floats:
        """Upper bounds of right ones and of failures, by the oldest stake of the window alone, `(2,)`."""
        if not self.rounds:
            return np.ones(2)
        right, images = (counts[self.rounds - 1 : self.rounds] for counts in self._since)
        return least_rejected(np.stack([right, images - right]), images, self.limit)

    @cached_property
    def _since(self) -> tuple[Counts, Counts]:
        """Right ones, and images, of the last 1, 2, ... rounds, `(R,)` each."""
        return np.cumsum(self.right[::-1]), np.cumsum(self.images[::-1])


def after_all(bounds: Bounds, rounds: Iterable[tuple[int, int]]) -> Bounds:
    """With many rounds (right, images), one after another, begun at 0."""
    for right, images in rounds:
        bounds = bounds.after(right, images, 0.0)
    return bounds


def windows_of(rounds: int) -> Counts:
    """Lengths of the windows that are compared after so many rounds, all of them together the last."""
    return np.append(WINDOWS[rounds > WINDOWS], rounds)


def undivided(right: Counts, images: Counts) -> Counts:
    """Place of the longest window such that neither it nor a shorter one shows a change, `(...)`.

    right, images: of windows that end now, shortest first, `(..., W)`. A window shows a change where one of the
    shorter ones, and what it has before that, differ: the log of their likelihood ratio is EVIDENCE or more.
    """
    one, n = right[..., :, None], images[..., :, None]
    last, m = right[..., None, :], images[..., None, :]
    gained = _likelihood(last, m) + _likelihood(one - last, n - m) - _likelihood(one, n)
    earlier = np.tri(right.shape[-1], k=-1, dtype=bool)
    divided = (earlier & (gained >= EVIDENCE)).any(axis=-1)
    return np.asarray(np.where(divided.any(axis=-1), divided.argmax(axis=-1), right.shape[-1]) - 1)


def _likelihood(right: Counts, images: Counts) -> Floats:
    """Log of it, at the share that was seen; nonsense where the counts are none, which nobody reads."""
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.asarray(xlogy(right, right) + xlogy(images - right, images - right) - xlogy(images, images))


def rejects(right: Counts, images: Counts, accuracy: Floats, limit: float) -> NDArray[np.bool_]:
    """Whether stakes that have seen such counts, `(..., S)`, own the limit together against `accuracy`, `(...)`."""
    prices = np.log1p(-accuracy[..., None] * (1 - RATIOS))[..., None]
    owned = np.log(RATIOS)[:, None] * right[..., None, :] - prices * images[..., None, :]
    with np.errstate(over="ignore"):  # infinitely often the limit is the limit
        return np.asarray(np.exp(owned - np.log(limit * len(RATIOS))).sum(axis=(-1, -2)) >= 1)


def least_rejected(right: Counts, images: Counts, limit: float) -> Floats:
    """The smallest accuracy against which such stakes, `(..., S)`, own the limit, `(...)`; 1 where there is none."""
    low, high = np.zeros(right.shape[:-1]), np.ones(right.shape[:-1])
    for _ in range(STEPS):
        middle = (low + high) / 2
        rejected = rejects(right, images, middle, limit)
        low, high = np.where(rejected, low, middle), np.where(rejected, middle, high)
    return high
