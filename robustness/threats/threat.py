"""What the attacker may do: a norm and a radius. eps is always in pixel units of [0, 1], written `8/255`."""

from __future__ import annotations

import math
from dataclasses import dataclass

from dfmcl.common.errors import BadInput

NORMS = ("linf", "l2")


@dataclass(frozen=True)
class Threat:
    """The set `{x' : ||x' - x|| <= eps, 0 <= x' <= 1}`; eps > 0 in pixel units."""

    norm: str
    eps: float
    label: str = ""

    def __post_init__(self) -> None:
        if self.norm not in NORMS:
            raise BadInput(f"threat: norm is {self.norm!r}; choose one of {', '.join(NORMS)}")
        if not (math.isfinite(self.eps) and self.eps >= 0):
            raise BadInput(f"threat: eps is {self.eps}; it must be a number >= 0, such as 8/255")
        if not self.label:
            object.__setattr__(self, "label", eps_label(self.eps, self.norm))

    @staticmethod
    def parse(norm: str, eps: str | float) -> Threat:
        """A threat from what a configuration says: eps as a number or as text such as `8/255`."""
        return Threat(norm, parse_eps(eps))

    def on_grid(self) -> Threat:
        """The largest ball of this kind that uint8 images can use: 20.4/255 becomes 20/255 in Linf."""
        if self.norm != "linf":
            return self
        steps = math.floor(self.eps * 255 + 1e-6)  # 1e-6: 8/255 * 255 must stay 8 in floating point
        return Threat(self.norm, steps / 255)

    def __str__(self) -> str:
        return f"{ {'linf': 'Linf', 'l2': 'L2'}[self.norm] } {self.label}"


def parse_eps(text: str | float) -> float:
    """`8/255`, `0.031` or a number, as a float."""
    try:
        if isinstance(text, str):
            top, _, bottom = text.partition("/")
            value = float(top) / float(bottom or "1")
        else:
            value = float(text)
        if math.isfinite(value):
            return value
    except (ValueError, ZeroDivisionError, TypeError):
        pass
    raise BadInput(f"eps: {text!r} is no radius; write a number or a fraction such as 8/255")


def eps_label(eps: float, norm: str = "linf") -> str:
    """The canonical way to write a radius: in 255ths for Linf, plain for L2."""
    return f"{eps * 255:.4g}/255" if norm == "linf" else f"{eps:.4g}"
