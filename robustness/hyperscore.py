"""HyperScore: a steep monotone rescaling of one accuracy figure. It ranks; it adds no information.

The source of DFMCL names it and gives its optimum (beta 4, gamma -ln 2, kappa 2) but not its formula. Other
papers of the same archive define `100 * (1 + sigmoid(beta * ln V + gamma) ** kappa)`, which is used here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from dfmcl.common.errors import BadInput


def hyperscore(value: float, beta: float = 4.0, gamma: float = -math.log(2), kappa: float = 2.0) -> float:
    """HyperScore of V in (0, 1]; between 100 (V -> 0) and 100 * (1 + sigmoid(gamma) ** kappa) at V = 1."""
    if not 0 < value <= 1:
        raise BadInput(f"hyperscore: V is {value}; it must lie in (0, 1]")
    exponent = beta * math.log(value) + gamma
    return 100 * (1 + math.pow(1 / (1 + math.exp(-exponent)), kappa))


def combined_value(accuracies: Mapping[str, Any], weights: Mapping[str, float]) -> float:
    """V: the weighted mean of named accuracies (clean, white-box, black-box); weights need not sum to 1."""
    missing = sorted(set(weights) - set(accuracies))
    total = sum(weights.values())
    if missing or total <= 0:
        raise BadInput(f"hyperscore: no accuracy for {missing}" if missing else "hyperscore: weights sum to 0")
    return sum(weights[name] * float(accuracies[name]) for name in weights) / total
