"""A norm and a radius as a configuration writes them."""

from __future__ import annotations

from typing import Annotated

from pydantic import AfterValidator

from dfmcl.common.errors import BadInput
from dfmcl.robustness.threats.l2 import L2
from dfmcl.robustness.threats.linf import Linf
from dfmcl.robustness.threats.threat import parse_eps

SUITED = (Linf.kind, L2.kind)  # the norms in which every attack of a suite can search


def _is_norm(text: str) -> str:
    if text not in SUITED:
        raise ValueError(f"choose one of {', '.join(SUITED)}")
    return text


def _is_radius(text: str) -> str:
    try:
        value = parse_eps(text)
    except BadInput as error:
        raise ValueError(str(error)) from None
    if not 0 < value <= 1:
        raise ValueError(f"{text!r} is {value:g}; a radius in pixel units lies in (0, 1]")
    return text


Norm = Annotated[str, AfterValidator(_is_norm)]
Radius = Annotated[str, AfterValidator(_is_radius)]
