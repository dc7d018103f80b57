"""What the images seen so far prove about a mean of shares: of an image, how many of its answers are right.

An image is asked about in several forms, such as under each of 75 corruptions. Its answers depend on one another, in a
way that nobody knows: an image that is hard in fog is hard in snow. So answers are not counted as if each were an image
of its own; what an image says is one number, its share of right answers, in [0, 1], and bounds are about the mean of
these over images. Nothing else is assumed of the shares.

A gambler bets against a mean m. A share x multiplies the stake by (1 + a x) / (1 + a m'), where m' is the mean that m
leaves for the images not seen yet (m itself, where images come from a population without end), and a > 0. That is
1 + lambda (x - m') with lambda = a / (1 + a m') below 1 / m': fair under m whatever the shares are, never into debt.
Who starts with 1 owns 1 / alpha at any time with probability at most alpha (Ville 1939). Of shares that are 0 or 1 the
factor is the likelihood ratio of an odds ratio 1 + a, as `sequential` bets. Betting on means of bounded numbers, also
without replacement: Waudby-Smith & Ramdas 2024, "Estimating means of bounded random variables by betting", sections 4
and 5. The capital is divided at the start between seven values of a.

Every factor falls as m grows, so that a bet which rejects m rejects each smaller mean, too: one threshold speaks for
all below it. Upper bounds are lower bounds of the failures.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from dfmcl.common.errors import BadInput
from dfmcl.robustness.records import Evaluation
from dfmcl.robustness.sequential import Counts, Floats
from dfmcl.robustness.statistics import Flags, Share

# An odds ratio of 1.08 to 170: shares that differ little from image to image allow larger stakes than flags do.
STAKES: Floats = np.expm1(0.08 * 2.0 ** np.arange(7))
MARKS = 400  # means that are tested, a quarter of a point apart; bounds are rounded outwards to the next
CHUNK = 64  # images whose wealth is computed at once
STEPS = 60  # of a bisection in [0, 1]: to the last digits of a double


@dataclass(frozen=True)
class AnswerCounts:
    """Of M images: how many of `asked` answers about each are right, `(M,)`."""

    right: Counts
    asked: int

    def __post_init__(self) -> None:
        if self.asked < 1 or ((self.right < 0) | (self.right > self.asked)).any():
            raise BadInput(f"means: right answers must lie between 0 and {self.asked}, of at least one an image")

    @staticmethod
    def of(evaluations: Sequence[Evaluation]) -> AnswerCounts:
        """By records of the same images under several threats: an answer is right where all of its attacks failed."""
        held = [np.array(one.robust_images, bool) for one in evaluations]
        return AnswerCounts(np.sum(held, axis=0, dtype=np.int64), len(held))

    @staticmethod
    def none(asked: int) -> AnswerCounts:
        """Of no image."""
        return AnswerCounts(np.zeros(0, np.int64), asked)

    @property
    def share(self) -> Share:
        """Right answers of all answers."""
        return Share(int(self.right.sum()), self.asked * len(self.right))

    @property
    def turned(self) -> AnswerCounts:
        """Wrong ones in place of right ones."""
        return replace(self, right=self.asked - self.right)

    def __len__(self) -> int:
        return len(self.right)

    def __getitem__(self, rows: Flags | slice) -> AnswerCounts:
        return replace(self, right=self.right[rows])

    def __add__(self, other: AnswerCounts) -> AnswerCounts:
        return replace(self, right=np.concatenate([self.right, other.right]))


@dataclass(frozen=True)
class Wealth:
    """What bets have won that the mean over `population` images is larger than each mark, in one order of the images.

    right, seen: answers and images so far; stakes: their worths `(A, MARKS)`; rejected: how many marks, from 0
    upwards, a bet has rejected at some time.
    """

    population: int
    asked: int
    stakes: Floats = field(default_factory=lambda: np.ones((len(STAKES), MARKS)))
    right: int = 0
    seen: int = 0
    rejected: int = 0

    def after(self, seen: AnswerCounts, confidence: float) -> tuple[Wealth, Counts]:
        """With the next images; and of each, the least number of right answers in the population that is left `(M,)`.

        Sums are whole numbers, so that a true mean on a mark is never rejected for its last digit.
        """
        least, now = [np.zeros(0, np.int64)], self
        for begin in range(0, len(seen), CHUNK):
            now, found = now._after(seen.right[begin : begin + CHUNK], confidence)
            least.append(found)
        return now, np.concatenate(least)

    def _after(self, right: Counts, confidence: float) -> tuple[Wealth, Counts]:
        whole, marks = self.population * self.asked, np.arange(self.rejected, MARKS)[:, None]
        so_far = self.right + np.cumsum(right)
        rest = marks * whole - MARKS * (so_far - right)  # of right answers, in marks
        left = self.population - self.seen - np.arange(len(right))
        mean = np.maximum(rest, 0) / (MARKS * self.asked * left)
        worth = 1 + STAKES[:, None] * (right / self.asked)
        factors = worth[:, None] / (1 + STAKES[:, None, None] * mean)
        # One factor after another, so that cuts make no difference. What overflows was rejected long before; a stake
        # that underflows is lost.
        with np.errstate(over="ignore", under="ignore"):
            owned = np.cumprod(np.concatenate([self.stakes[:, self.rejected :, None], factors], axis=-1), axis=-1)
        rejects = (owned[..., 1:].sum(axis=0) >= len(STAKES) / (1 - confidence)) | (rest < MARKS * right)
        count = self.rejected + np.maximum.accumulate(np.cumprod(rejects, axis=0).sum(axis=0))
        # All means up to mark (count - 1) are rejected, so that at least one answer more is right.
        least = np.where(count > 0, (count - 1) * whole // MARKS + 1, 0)
        stakes = self.stakes.copy()
        stakes[:, self.rejected :] = owned[..., -1]
        after = replace(
            self, stakes=stakes, right=int(so_far[-1]), seen=self.seen + len(right), rejected=int(count[-1])
        )
        return after, np.maximum(least, so_far)


@dataclass(frozen=True)
class MeanSequence:
    """Which numbers of right answers in the whole population are left after each of the T images seen.

    As a ConfidenceSequence, whose images are drawn without replacement: `lower` and `upper` are counts of
    population * asked answers `(T,)`, both included, each one-sided and wrong ever with probability at most
    1 - `confidence`.
    """

    population: int
    asked: int
    confidence: float
    lower: Counts
    upper: Counts
    above: Wealth
    below: Wealth

    @staticmethod
    def begin(population: int, asked: int, confidence: float) -> MeanSequence:
        """Before the first image."""
        if population < 1 or not 0 < confidence < 1:
            raise BadInput(f"means: {population} images at confidence {confidence}; it needs one, and from 0 to 1")
        nothing, none = Wealth(population, asked), np.zeros(0, np.int64)
        return MeanSequence(population, asked, confidence, none, none, nothing, nothing)

    def after(self, seen: AnswerCounts) -> MeanSequence:
        """With the next images in the fixed order; where it is cut makes no difference."""
        if self.above.seen + len(seen) > self.population or seen.asked != self.asked:
            raise BadInput(
                f"means: {self.above.seen + len(seen)} images of {self.population}, {seen.asked} answers each"
            )
        above, least_right = self.above.after(seen, self.confidence)
        below, least_wrong = self.below.after(seen.turned, self.confidence)
        whole = self.population * self.asked
        right = self.above.right + np.cumsum(seen.right)
        wrong = self.below.right + np.cumsum(seen.turned.right)
        return replace(
            self,
            above=above,
            below=below,
            lower=np.concatenate([self.lower, np.minimum(least_right, whole - wrong)]),
            upper=np.concatenate([self.upper, np.maximum(whole - least_wrong, right)]),
        )


def mean_lower_bound(seen: AnswerCounts, confidence: float) -> float:
    """One-sided lower bound of the mean share in the population that images are drawn from, by one look at all."""
    if not len(seen):
        return 0.0
    gained = np.log1p(STAKES * (seen.right / seen.asked)[:, None]).sum(axis=0)
    low, high = 0.0, 1.0
    for _ in range(STEPS):
        middle = (low + high) / 2
        logs = gained - len(seen) * np.log1p(STAKES * middle)
        rejected = np.logaddexp.reduce(logs) - np.log(len(STAKES)) >= -np.log1p(-confidence)
        low, high = (middle, high) if rejected else (low, middle)
    return low


def mean_upper_bound(seen: AnswerCounts, confidence: float) -> float:
    """The same from above."""
    return 1 - mean_lower_bound(seen.turned, confidence)
