"""A radius as a configuration writes it."""

from __future__ import annotations

from typing import Annotated

from pydantic import AfterValidator

from dfmcl.common.errors import BadInput
from dfmcl.robustness.threats.threat import parse_eps


def _is_radius(text: str) -> str:
    try:
        value = parse_eps(text)
    except BadInput as error:
        raise ValueError(str(error)) from None
    if not 0 < value <= 1:
        raise ValueError(f"{text!r} is {value:g}; a radius in pixel units lies in (0, 1]")
    return text


Radius = Annotated[str, AfterValidator(_is_radius)]
