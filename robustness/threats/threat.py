"""What an attacker may do to an image: the little that attacks, checks and judges ask of it.

A member is a file of this room and a line of its registry. Letters used here: N batch, C H W image; x images as float
in [0, 1], `(N, C, H, W)`. torch loads when a random start is drawn: policies know threats without it.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Self

from dfmcl.common.errors import BadInput

if TYPE_CHECKING:
    import torch
    from torch import Tensor

RADIUS = "a radius is above 0, and in Linf at most 1 (pixel units: 8/255, not 8)"


@dataclass(frozen=True)
class Threat(ABC):
    """The images `{x' : length(x' - x) <= eps, 0 <= x' <= 1}`; eps >= 0 in pixel units of [0, 1].

    norm: as policies and records spell it; name: as people do.
    most: a radius beyond which none makes sense, inf where there is no such.
    slack: how far float32 arithmetic may carry a projected point out of its ball; a uint8 step is 4e-3.
    level: by how much a ball must grow, at least, to hold other images of whole grey levels.
    """

    norm: ClassVar[str]
    name: ClassVar[str]
    most: ClassVar[float]
    slack: ClassVar[float]
    level: ClassVar[float]
    eps: float

    def __post_init__(self) -> None:
        if not (math.isfinite(self.eps) and self.eps >= 0):
            raise BadInput(f"threat: eps is {self.eps}; it must be a number >= 0, such as 8/255")

    @property
    def sensible(self) -> bool:
        """Whether a user may have meant it; RADIUS says which radii make sense."""
        return 0 < self.eps <= self.most

    @property
    @abstractmethod
    def label(self) -> str:
        """The canonical way to write the radius."""

    @staticmethod
    @abstractmethod
    def lengths(delta: Tensor) -> Tensor:
        """Length of each image's perturbation: `(N, ...)` -> `(N,)`."""

    @staticmethod
    @abstractmethod
    def diameter(values: int) -> float:
        """The length of a step that moves each of so many values from 0 to 1: no image lies farther away."""

    @staticmethod
    @abstractmethod
    def steepest(gradient: Tensor) -> Tensor:
        """The step of length 1 that raises the loss most."""

    @abstractmethod
    def start(self, x: Tensor, generator: torch.Generator) -> Tensor:
        """A random point of the ball around x, uniform in it but for what is clipped to [0, 1]."""

    @abstractmethod
    def project(self, x_adv: Tensor, x: Tensor) -> Tensor:
        """The point of the ball around x (and of [0, 1]) that an attack step is pulled back to.

        Exact projection onto the ball, then onto the box; as x is in the box, the second step never leaves the ball.
        """

    @abstractmethod
    def on_grid(self) -> Threat:
        """The largest ball of this kind that uint8 images can use: 20.4/255 becomes 20/255 in Linf."""

    @abstractmethod
    def whole_levels(self, moved: Tensor) -> Tensor:
        """Whole grey levels near `moved` `(N, ...)`, in levels too, that are inside the ball where `moved` is."""

    @abstractmethod
    def contains_uint8(self, adversarial: Tensor, images: Tensor) -> Tensor:
        """Exact membership of uint8 images in the ball, in integer arithmetic: `(N, ...)` x 2 -> `(N,)` bool."""

    def outermost(self, x_adv: Tensor, x: Tensor) -> Tensor | None:
        """x_adv moved on to the ball's border; None where rounding to bytes does not lead back from there."""
        return None

    def sized(self, eps: float) -> Self:
        """The same kind with another radius."""
        return replace(self, eps=eps)

    def contains(self, x_adv: Tensor, x: Tensor) -> Tensor:
        """Whether each image lies in the ball and in [0, 1], up to float rounding: `(N,)` bool."""
        inside = self.lengths(x_adv - x) <= self.eps + self.slack
        return inside & ((x_adv >= 0) & (x_adv <= 1)).flatten(1).all(dim=1)

    def to_uint8(self, x_adv: Tensor, x: Tensor) -> Tensor:
        """Adversarial images as bytes `(N, C, H, W)` that stay inside the ball around x, which is on the uint8 grid."""
        origin = (x * 255).round()
        return (origin + self.whole_levels(x_adv * 255 - origin)).clamp(0, 255).byte()

    def __str__(self) -> str:
        return f"{self.name} {self.label}"


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
