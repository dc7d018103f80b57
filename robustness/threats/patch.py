"""An adversarial patch: one square anywhere in the image, in which every value is free."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dfmcl.common.errors import BadInput
from dfmcl.robustness.threats.spatial import written
from dfmcl.robustness.threats.threat import Threat, in_box

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Patch(Threat):
    """side: of the square in pixels, or 0; share: of the image's pixels, at least so many are in the square.

    2 % of 32 x 32 pixels are a square of 5 x 5, of 224 x 224 one of 32 x 32: rounded up, as in work on certified
    defences (PatchGuard, Xiang et al. 2021).
    """

    kind, name, heads = "patch", "patch", ("patch",)
    examples = ("patch:5x5", "patch:2%")
    side: int = 0
    share: float = 0.0

    def __post_init__(self) -> None:
        if (self.side > 0) == (self.share > 0) or self.side < 0 or not 0 <= self.share < 1:
            raise BadInput("threat patch: is a square such as patch:5x5, or a share of the pixels such as patch:2%")

    @classmethod
    def parse(cls, text: str) -> Patch:
        size = text.partition(":")[2]
        height, _, width = size.partition("x")
        try:
            if size.endswith("%"):
                return cls(share=float(size[:-1]) / 100)
            if height.isdecimal() and height == width:
                return cls(side=int(height))
        except ValueError:
            pass
        raise BadInput(f"threat {text}: write a square such as patch:5x5, or a share of the pixels such as patch:2%")

    @property
    def spelling(self) -> str:
        return f"patch:{self.side}x{self.side}" if self.side else f"patch:{written(100 * self.share)}%"

    @property
    def label(self) -> str:
        return f"{self.side}x{self.side}" if self.side else f"{written(100 * self.share)} %"

    def pixels(self, shape: tuple[int, ...]) -> int:
        """The side of the square in images `(C, H, W)`; BadInput where they have no room for it."""
        height, width = shape[1:]
        side = self.side or math.ceil(math.sqrt(self.share * height * width) - 1e-9)
        if side > min(height, width):
            raise BadInput(f"threat {self}: a square of {side} pixels does not fit into images of {height}x{width}")
        return side

    def fits(self, shape: tuple[int, ...]) -> None:
        self.pixels(shape)

    def contains_uint8(self, adversarial: Tensor, images: Tensor) -> Tensor:
        return self._covers(adversarial != images)

    def contains(self, x_adv: Tensor, x: Tensor) -> Tensor:
        return self._covers(x_adv != x) & in_box(x_adv)

    def _covers(self, changed: Tensor) -> Tensor:
        """Whether one square covers all values that changed: bool `(N, C, H, W)` -> `(N,)`."""
        side = self.pixels(tuple(changed.shape[1:]))
        somewhere = changed.any(dim=1)
        return (_extent(somewhere.any(dim=2)) <= side) & (_extent(somewhere.any(dim=1)) <= side)


def _extent(flags: Tensor) -> Tensor:
    """From the first to the last that is set, `(N, L)` -> `(N,)`; 0 where none is."""
    first = flags.int().argmax(dim=1)
    last = flags.shape[1] - 1 - flags.flip(1).int().argmax(dim=1)
    return (last - first + 1) * flags.any(dim=1)
