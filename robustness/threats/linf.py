"""Linf: each value of the image moves by eps at most."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dfmcl.robustness.threats.ball import Ball

if TYPE_CHECKING:
    import torch
    from torch import Tensor


@dataclass(frozen=True)
class Linf(Ball):
    kind, name, heads, examples = "linf", "Linf", ("linf",), ("linf:8/255", "8/255")
    most, slack, level = 1.0, 1e-6, 1 / 255

    @property
    def label(self) -> str:
        return in_255ths(self.eps)

    @property
    def levels(self) -> int:
        """By how many whole grey levels a value may move."""
        return math.floor(self.eps * 255 + 1e-6)  # 1e-6: 8/255 * 255 must stay 8 in floating point

    @staticmethod
    def lengths(delta: Tensor) -> Tensor:
        return delta.flatten(1).abs().amax(dim=1)

    @staticmethod
    def diameter(values: int) -> float:
        return 1.0

    @staticmethod
    def steepest(gradient: Tensor) -> Tensor:
        return gradient.sign()

    def start(self, x: Tensor, generator: torch.Generator) -> Tensor:
        import torch

        noise = torch.rand(x.shape, generator=generator, device=x.device, dtype=x.dtype) * 2 - 1
        return (x + self.eps * noise).clamp(0, 1)

    def project(self, x_adv: Tensor, x: Tensor) -> Tensor:
        return x_adv.maximum(x - self.eps).minimum(x + self.eps).clamp(0, 1)

    def on_grid(self) -> Linf:
        return Linf(self.levels / 255)

    def whole_levels(self, moved: Tensor) -> Tensor:
        return moved.round().clamp(-self.levels, self.levels)

    def contains_uint8(self, adversarial: Tensor, images: Tensor) -> Tensor:
        return self.lengths(adversarial.long() - images.long()) <= self.levels


def in_255ths(eps: float) -> str:
    """`8/255`."""
    return f"{eps * 255:.4g}/255"
