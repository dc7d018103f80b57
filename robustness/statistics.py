"""How much n images can say about a share, and about the difference between two models on the same images."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.special import bdtr, bdtrc, betaincinv  # scipy.stats, the same, would take as long to load as torch

from dfmcl.common.errors import BadInput

Flags = NDArray[np.bool_]


def lower_bound(k: int, n: int, confidence: float) -> float:
    """Exact one-sided lower bound of a binomial share after k of n. Clopper & Pearson 1934."""
    _check(k, n, confidence)
    return 0.0 if k == 0 else float(betaincinv(k, n - k + 1, 1 - confidence))


def upper_bound(k: int, n: int, confidence: float) -> float:
    """Exact one-sided upper bound of a binomial share after k of n. Clopper & Pearson 1934."""
    _check(k, n, confidence)
    return 1.0 if k == n else float(betaincinv(k + 1, n - k, confidence))


def clopper_pearson(k: int, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """Exact two-sided interval: each side misses with probability at most (1 - confidence) / 2."""
    one_sided = 1 - (1 - confidence) / 2
    return lower_bound(k, n, one_sided), upper_bound(k, n, one_sided)


@dataclass(frozen=True)
class Share:
    """k of n images, with its exact two-sided 95 % interval."""

    k: int
    n: int

    @property
    def value(self) -> float:
        return self.k / self.n if self.n else float("nan")

    @property
    def bounds(self) -> tuple[float, float]:
        return clopper_pearson(self.k, self.n)

    def __str__(self) -> str:
        lower, upper = self.bounds
        return f"{100 * self.value:.1f} % [{100 * lower:.1f}, {100 * upper:.1f}]"


@dataclass(frozen=True)
class PairedCounts:
    """Two models on the same images: how many only the first holds, and how many only the second."""

    only_first: int
    only_second: int

    @staticmethod
    def of(first: Flags, second: Flags) -> PairedCounts:
        """From per-image flags `(N,)` of both."""
        _check_paired(first, second)
        return PairedCounts(int((first & ~second).sum()), int((second & ~first).sum()))

    @property
    def p(self) -> float:
        """Exact two-sided p of equal accuracies: a fair coin for each image that differs. McNemar 1947."""
        smaller, differing = min(self.only_first, self.only_second), self.only_first + self.only_second
        return min(1.0, 2 * float(bdtr(smaller, differing, 0.5)))

    @property
    def p_more_lost(self) -> float:
        """Exact one-sided p of the second being no worse: how often chance gives the first at least so many more."""
        return float(bdtrc(self.only_first - 1, self.only_first + self.only_second, 0.5))


def bootstrap_difference(
    first: Flags, second: Flags, *, seed: int = 0, resamples: int = 10_000, confidence: float = 0.95
) -> tuple[float, float]:
    """Percentile interval of the difference of mean accuracies, first minus second, from flags `(S, N)`.

    S training seeds and N images are both drawn with replacement (crossed: an image keeps its answers under all seeds),
    so that the interval covers new seeds as well as new images. Davison & Hinkley 1997, 3.8. With S = 1 it speaks of
    these two networks only; with S = 2 or 3 it is too narrow in the seeds' part, as a bootstrap of so few is.
    """
    _check_paired(first, second)
    stream = np.random.default_rng(seed)
    differences = first.astype(np.int8) - second.astype(np.int8)
    # Images of one pattern over the seeds are interchangeable: 3^S counts a resample instead of N draws.
    patterns, counts = np.unique(differences, axis=1, return_counts=True)
    seeds, images = differences.shape
    drawn = stream.multinomial(images, counts / images, size=resamples)
    means = patterns[stream.integers(seeds, size=(resamples, seeds))].mean(axis=1)
    low, high = np.quantile((drawn * means).sum(axis=1) / images, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


def _check_paired(first: Flags, second: Flags) -> None:
    if first.shape != second.shape or not first.size:
        raise BadInput(f"statistics: flags {first.shape} and {second.shape} are no pairs; need the same images, >= 1")


def _check(k: int, n: int, confidence: float) -> None:
    if n < 1 or not 0 <= k <= n:
        raise BadInput(f"statistics: {k} of {n} is no count; need 0 <= k <= n and n >= 1")
    if not 0 < confidence < 1:
        raise BadInput(f"statistics: confidence is {confidence}; it must lie between 0 and 1")
