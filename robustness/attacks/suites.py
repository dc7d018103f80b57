"""Names of attacks and suites, for a reader of records too, who has no torch."""

from __future__ import annotations

import re
from typing import Any

AUTOATTACK = ("apgd-ce", "apgd-t", "fab-t", "square")
"""The four of AutoAttack's protocol, the cheapest killer first. Croce & Hein 2020."""

# In each subspace ten steps break all but 2 of 64 images that twenty break (plain network, 8/255, 20/255), at half the
# price.
SUBSPACE = "subspace-10"

# Constraint relaxation breaks what APGD-CE and APGD-T break, at a tenth of their passes, but on some networks it sees
# nothing (after catastrophic overfitting): a short APGD looks at what it left, and the check `cr_is_blind` at both.
RELAXED = "cr"
GUARD = "apgd-ce-20"

# The worst case per image. What no honest network falls to, the subspaces, comes last: it sees only what is left.
SUITES: dict[str, tuple[str, ...]] = {
    "fast": (RELAXED, GUARD, SUBSPACE),
    "standard": (*AUTOATTACK, SUBSPACE),
}

# Of the gate, by kind of threat, where the suites cannot search.
BY_KIND: dict[str, tuple[str, ...]] = {
    "l1": ("apgd-ce-50", "apgd-t-25"),
    "patch": ("patch", "patch-rs-500"),
    "spatial": ("grid",),
    "corruption": ("grid",),
}

# Of a measurement, by kind of threat, where the user names no attack.
DEFAULTS: dict[str, tuple[str, ...]] = {
    "linf": ("fgsm", "pgd-20", "margin-pgd-20"),
    "l2": ("cw-l2",),
    "l1": ("apgd-ce",),
    "patch": ("patch",),
    "spatial": ("grid",),
    "corruption": ("grid",),
}

# They ask for scores or labels only; the number in their name is that of queries.
WITHOUT_GRADIENTS = ("square", "square-subspace", "rays", "patch-rs", "grid")

FROM = " from "  # between an attack's name and that of the other network on which it was crafted
# Crafted on another network: the last iterate, as one that fools the surrogate early says little about the other.
LAST = {"steps": 10, "keep": "last"}
ONE_STEP = "fgsm"

NAME = re.compile(
    r"(?P<kind>.+?)(?:-(?P<steps>[0-9]{1,9})(?:x(?P<restarts>[0-9]{1,9}))?)?(?:@(?P<step_size>.*))?", re.DOTALL
)


def parameters_of(name: str) -> tuple[str, dict[str, Any]]:
    """The kind of an attack, and the parameters that its name fixes; whether there is such a kind is not asked."""
    found = NAME.fullmatch(name)
    if found is None:
        return name, {}
    kind = found["kind"]
    parameters: dict[str, Any] = {key: int(found[key]) for key in ("steps", "restarts") if found[key]}
    if "steps" in parameters and kind in WITHOUT_GRADIENTS:
        parameters["queries"] = parameters.pop("steps")
    if found["step_size"] is not None:
        parameters["step_size"] = found["step_size"]
    return kind, parameters


def carried_by(name: str) -> dict[str, Any]:
    """The same parameters where it is crafted on another network."""
    kind, parameters = parameters_of(name.partition(FROM)[0])
    return {**({} if kind == ONE_STEP else LAST), **parameters}
