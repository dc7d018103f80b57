"""Names of attacks and suites, for a reader of records too, who has no torch."""

from __future__ import annotations

AUTOATTACK = ("apgd-ce", "apgd-t", "fab-t", "square")
"""The four of AutoAttack's protocol, the cheapest killer first. Croce & Hein 2020."""

# In each subspace ten steps break all but 2 of 64 images that twenty break (plain network, 8/255, 20/255), at half the
# price.
SUBSPACE = "subspace-10"

# The worst case per image. What no honest network falls to, the subspaces, comes last: it sees only what is left.
SUITES: dict[str, tuple[str, ...]] = {
    "fast": ("apgd-ce", "apgd-t", SUBSPACE),
    "standard": (*AUTOATTACK, SUBSPACE),
}

# They ask for scores or labels only; the number in their name is that of queries.
WITHOUT_GRADIENTS = ("square", "square-subspace", "rays")

FROM = " from "  # between an attack's name and that of the other network on which it was crafted
