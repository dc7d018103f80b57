"""All threats, by the norm that policies and records name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

from dfmcl.common.errors import BadInput
from dfmcl.robustness.threats.l2 import L2
from dfmcl.robustness.threats.linf import Linf
from dfmcl.robustness.threats.threat import Threat, parse_eps

T = TypeVar("T")
THREATS: dict[str, type[Threat]] = {kind.norm: kind for kind in (Linf, L2)}


def by_norm(table: Mapping[str, T], norm: str, who: str = "threat") -> T:
    """What a table has for a norm; BadInput where it has nothing, so that nothing is taken for another norm's."""
    if norm not in table:
        raise BadInput(f"{who}: norm is {norm!r}; choose one of {', '.join(table)}")
    return table[norm]


def threat_of(norm: str, eps: str | float) -> Threat:
    """eps: a number, or text such as `8/255`. BadInput where the norm is unknown or eps no radius."""
    return by_norm(THREATS, norm)(parse_eps(eps))
