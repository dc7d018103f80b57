"""What an attacker may do to an image: the little that every attack, check and judge may ask of it.

A member is a file of this room and a line of its registry. Letters used here: N batch, C H W image; x images as float
in [0, 1], `(N, C, H, W)`. torch loads when images come: policies know threats without it.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, ClassVar, Self

from dfmcl.common.errors import BadInput

if TYPE_CHECKING:
    from torch import Tensor


class Threat(ABC):
    """A set of images around each image, the image itself among them.

    kind: as tables name it, one for each class. name: as people do. heads: the words with which its spellings begin.
    examples: spellings, for help and messages.
    """

    kind: ClassVar[str]
    name: ClassVar[str]
    heads: ClassVar[tuple[str, ...]]
    examples: ClassVar[tuple[str, ...]]

    @classmethod
    @abstractmethod
    def parse(cls, text: str) -> Threat:
        """From a spelling that begins with one of `heads`; BadInput where the rest makes no sense."""

    @property
    @abstractmethod
    def spelling(self) -> str:
        """The canonical text that `parse` reads as this threat, every default written out."""

    @property
    @abstractmethod
    def label(self) -> str:
        """What follows the name where people read it: `8/255` of `Linf 8/255`."""

    @abstractmethod
    def contains_uint8(self, adversarial: Tensor, images: Tensor) -> Tensor:
        """Exact membership of uint8 images, in integer arithmetic: `(N, C, H, W)` x 2 -> `(N,)` bool."""

    def contains(self, x_adv: Tensor, x: Tensor) -> Tensor:
        """Whether each float image is a member, `(N,)` bool. Here: whole grey levels that are one as bytes."""
        levels = x_adv * 255
        whole = ((levels - levels.round()).abs() < 1e-3).flatten(1).all(dim=1)  # float32 carries a level to 2e-5
        return whole & in_box(x_adv) & self.contains_uint8(as_levels(x_adv), as_levels(x))

    def to_uint8(self, x_adv: Tensor, x: Tensor) -> Tensor:
        """Adversarial images as bytes `(N, C, H, W)` that are members where x_adv is; x is on the uint8 grid."""
        return as_levels(x_adv)

    def on_grid(self) -> Self:
        """The largest threat of this kind that uint8 images can use: 20.4/255 becomes 20/255 in Linf."""
        return self

    def outermost(self, x_adv: Tensor, x: Tensor) -> Tensor | None:
        """x_adv moved on to the border; None where rounding to bytes does not lead back from there."""
        return None

    def fits(self, shape: tuple[int, ...]) -> None:
        """BadInput where images `(C, H, W)` have no room for it."""
        return  # most threats fit any image

    @property
    def parts(self) -> tuple[Threat, ...]:
        """The threats that are attacked one by one: itself, unless it is a union."""
        return (self,)

    def to_json(self) -> dict[str, Any]:
        """As records hold it; `registry.threat_from_json` reads it."""
        return {"spelling": self.spelling, "label": str(self)}

    def __str__(self) -> str:
        return f"{self.name} {self.label}"


def as_levels(x: Tensor) -> Tensor:
    """Float images in [0, 1] as bytes."""
    return (x * 255).round().clamp(0, 255).byte()


def in_box(x: Tensor) -> Tensor:
    """Whether each image lies in [0, 1], `(N,)` bool."""
    inside: Tensor = ((x >= 0) & (x <= 1)).flatten(1).all(dim=1)
    return inside


def parse_eps(text: str | float) -> float:
    """`8/255`, `0.031` or a number, as a float."""
    try:
        if isinstance(text, str):
            if not text.isascii():  # float() reads the digits of every script
                raise ValueError(text)
            top, _, bottom = text.partition("/")
            value = float(top) / float(bottom or "1")
        else:
            value = float(text)
        if math.isfinite(value):
            return value
    except (ValueError, ZeroDivisionError, TypeError):
        pass
    raise BadInput(f"eps: {text!r} is no radius; write a number or a fraction such as 8/255")
