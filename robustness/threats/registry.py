"""All threats: by the word with which their spelling begins, and one grammar for the command line and for records."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, TypeVar

from dfmcl.common.errors import BadInput
from dfmcl.robustness.threats.ball import Ball, as_ball
from dfmcl.robustness.threats.corruption import Corruption
from dfmcl.robustness.threats.l1 import L1
from dfmcl.robustness.threats.l2 import L2
from dfmcl.robustness.threats.linf import Linf
from dfmcl.robustness.threats.patch import Patch
from dfmcl.robustness.threats.spatial import Spatial
from dfmcl.robustness.threats.threat import Threat, parse_eps
from dfmcl.robustness.threats.union import Union

T = TypeVar("T")
FAMILIES: tuple[type[Threat], ...] = (Linf, L2, L1, Patch, Spatial, Corruption)
THREATS: dict[str, type[Threat]] = {head: family for family in FAMILIES for head in family.heads}
BALLS: dict[str, type[Ball]] = {head: family for head, family in THREATS.items() if issubclass(family, Ball)}
HEAD = re.compile(r"[a-z_0-9]+")


def by_norm(table: Mapping[str, T], norm: str, who: str = "threat") -> T:
    """What a table has for a norm; BadInput where it has nothing, so that nothing is taken for another norm's."""
    if norm not in table:
        raise BadInput(f"{who}: norm is {norm!r}; choose one of {', '.join(table)}")
    return table[norm]


def threat_of(norm: str, eps: str | float) -> Ball:
    """eps: a number, or text such as `8/255`. BadInput where the norm is unknown or eps no radius."""
    return by_norm(BALLS, norm)(parse_eps(eps))


def parse_threat(text: str) -> Threat:
    """The threat that a spelling such as `linf:8/255`, `8/255` (Linf), `patch:5x5` or `fog@3|rotation:30` names.

    `|` joins threats to their union. BadInput for an unknown spelling, with the known ones.
    """
    return Union.of([_parse_one(part.strip()) for part in text.split("|")])


def parse_ball(text: str) -> Ball:
    """The same for a use that needs a norm; BadInput for other threats."""
    return as_ball(parse_threat(text), "threat")


def _parse_one(text: str) -> Threat:
    if text[:1].isdigit() or text[:1] in "+-.":
        text = f"{Linf.kind}:{text}"
    head = HEAD.match(text)
    family = THREATS.get(head[0]) if head else None
    if family is None:
        known = [*(example for family in FAMILIES for example in family.examples), *Union.examples]
        raise BadInput(f"threat {text!r} is unknown; write one such as {', '.join(known)}; words: {', '.join(THREATS)}")
    return family.parse(text)


def threat_from_json(value: Mapping[str, Any]) -> Threat:
    """The inverse of `Threat.to_json`."""
    if "norm" in value:
        return by_norm(BALLS, value["norm"])(value["eps"])
    if "members" in value:
        return Union.of([threat_from_json(member) for member in value["members"]])
    return parse_threat(value["spelling"])
