"""A ball of a norm around the image, cut by [0, 1]: what attacks by gradients move in."""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Self

from dfmcl.common.errors import BadInput
from dfmcl.robustness.threats.threat import Threat, in_box, parse_eps

if TYPE_CHECKING:
    import torch
    from torch import Tensor

RADIUS = "a radius is above 0, and in Linf at most 1 (pixel units: 8/255, not 8)"


@dataclass(frozen=True)
class Ball(Threat):
    """The images `{x' : length(x' - x) <= eps, 0 <= x' <= 1}`; eps >= 0 in pixel units of [0, 1].

    most: a radius beyond which none makes sense, inf where there is no such.
    slack: how far float32 arithmetic may carry a projected point out of its ball; a uint8 step is 4e-3.
    level: by how much a ball must grow, at least, to hold other images of whole grey levels.
    """

    most: ClassVar[float]
    slack: ClassVar[float]
    level: ClassVar[float]
    eps: float

    def __post_init__(self) -> None:
        if not (math.isfinite(self.eps) and self.eps >= 0):
            raise BadInput(f"threat: eps is {self.eps}; it must be a number >= 0, such as 8/255")

    @classmethod
    def parse(cls, text: str) -> Self:
        head, _, eps = text.partition(":")
        ball = cls(parse_eps(eps))
        if head not in cls.heads or not ball.sensible:
            raise BadInput(f"threat {text}: {RADIUS}")
        return ball

    @property
    def norm(self) -> str:
        """As policies and records spell it."""
        return self.kind

    @property
    def spelling(self) -> str:
        return f"{self.kind}:{self.label if parse_eps(self.label) == self.eps else repr(self.eps)}"

    @property
    def sensible(self) -> bool:
        """Whether a user may have meant it; RADIUS says what he may mean."""
        return 0 < self.eps <= self.most

    @property
    def label(self) -> str:
        """The canonical way to write the radius."""
        return f"{self.eps:.4g}"

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

        Linf, L2: exact projection onto the ball, then onto the box; as x is in the box, the second step never leaves
        the ball. L1: exact projection onto both at once.
        """

    @abstractmethod
    def whole_levels(self, moved: Tensor) -> Tensor:
        """Whole grey levels near `moved` `(N, ...)`, in levels too, that are inside the ball where `moved` is."""

    def sized(self, eps: float) -> Self:
        """The same kind with another radius."""
        return replace(self, eps=eps)

    def contains(self, x_adv: Tensor, x: Tensor) -> Tensor:
        """Whether each image lies in the ball and in [0, 1], up to float rounding: `(N,)` bool."""
        return (self.lengths(x_adv - x) <= self.eps + self.slack) & in_box(x_adv)

    def to_uint8(self, x_adv: Tensor, x: Tensor) -> Tensor:
        """Adversarial images as bytes `(N, C, H, W)` that stay inside the ball around x, which is on the uint8 grid."""
        origin = (x * 255).round()
        return (origin + self.whole_levels(x_adv * 255 - origin)).clamp(0, 255).byte()

    def to_json(self) -> dict[str, Any]:
        return {"norm": self.kind, "eps": self.eps, "label": self.label}


def as_ball(threat: Threat, who: str) -> Ball:
    """The threat where it is a ball; BadInput that names the part of the program which needs one."""
    if not isinstance(threat, Ball):
        raise BadInput(f"{who}: {threat} is no ball of a norm; take one such as linf:8/255 or l2:0.5")
    return threat
