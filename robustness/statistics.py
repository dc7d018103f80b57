"""How much n images can say about a share: exact bounds."""

from __future__ import annotations

from dataclasses import dataclass

from scipy.stats import beta

from robustness.errors import BadInput


def lower_bound(k: int, n: int, confidence: float) -> float:
    """Exact one-sided lower bound of a binomial share after k of n. Clopper & Pearson 1934."""
    _check(k, n, confidence)
    return 0.0 if k == 0 else float(beta.ppf(1 - confidence, k, n - k + 1))


def upper_bound(k: int, n: int, confidence: float) -> float:
    """Exact one-sided upper bound of a binomial share after k of n. Clopper & Pearson 1934."""
    _check(k, n, confidence)
    return 1.0 if k == n else float(beta.ppf(confidence, k + 1, n - k))


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


def _check(k: int, n: int, confidence: float) -> None:
    if n < 1 or not 0 <= k <= n:
        raise BadInput(f"statistics: {k} of {n} is no count; need 0 <= k <= n and n >= 1")
    if not 0 < confidence < 1:
        raise BadInput(f"statistics: confidence is {confidence}; it must lie between 0 and 1")
