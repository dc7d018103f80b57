"""The sign-flip test, for images that a peer attacks together: they share its draws, so the group is the unit."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def sign_flip_p(differences: NDArray[np.int64]) -> float:
    """How often a fair coin for the sign of each difference `(G,)` gives a sum at least as large as theirs. Exact.

    Fisher 1935: where two programs are equally good, each group's difference has either sign with equal chance.
    """
    sizes = np.abs(differences)
    reach = int(sizes.sum())
    chance = np.zeros(2 * reach + 1)  # of each sum, from -reach to reach
    chance[reach] = 1.0
    for size in sizes[sizes > 0]:
        chance = (np.roll(chance, size) + np.roll(chance, -size)) / 2  # nothing wraps: sums so far are shorter
    return float(chance[reach + int(differences.sum()) :].sum())
