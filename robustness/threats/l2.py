"""L2: the Euclidean length of the perturbation, over all values of the image, is eps at most."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dfmcl.robustness.threats.ball import Ball

if TYPE_CHECKING:
    import torch
    from torch import Tensor


@dataclass(frozen=True)
class L2(Ball):
    kind, name, heads, examples = "l2", "L2", ("l2",), ("l2:0.5",)
    most = math.inf
    slack = 1e-4  # eps is ~50 at most, where one rounding is 4e-6
    level = 0.0  # lengths of whole levels are roots of whole numbers, as close as wanted

    @staticmethod
    def lengths(delta: Tensor) -> Tensor:
        length: Tensor = delta.flatten(1).norm(dim=1)
        return length

    @staticmethod
    def diameter(values: int) -> float:
        return math.sqrt(values)

    @staticmethod
    def steepest(gradient: Tensor) -> Tensor:
        return gradient / _each(L2.lengths(gradient).clamp_min(1e-12), gradient)

    def start(self, x: Tensor, generator: torch.Generator) -> Tensor:
        import torch

        noise = torch.randn(x.shape, generator=generator, device=x.device, dtype=x.dtype)
        radius = torch.rand(len(x), generator=generator, device=x.device, dtype=x.dtype)
        radius = self.eps * radius.pow(1 / max(1, x[0].numel())) if len(x) else radius
        return (x + noise * _each(radius / self.lengths(noise).clamp_min(1e-12), x)).clamp(0, 1)

    def project(self, x_adv: Tensor, x: Tensor) -> Tensor:
        delta = x_adv - x
        length = self.lengths(delta).clamp_min(1e-12)  # a zero perturbation stays zero
        return (x + delta * _each((self.eps / length).clamp(max=1.0), x)).clamp(0, 1)

    def outermost(self, x_adv: Tensor, x: Tensor) -> Tensor:
        return self.project(x + self.eps * self.steepest(x_adv - x), x)

    def whole_levels(self, moved: Tensor) -> Tensor:
        """The nearest; where that leaves the ball, values that were rounded away from 0 go one level back, those first
        that were rounded farthest, until the image is inside."""
        exact, radius = moved.flatten(1), self.eps * 255
        size = exact.abs().round()
        excess = size - exact.abs()  # above 0 where rounding went outwards
        order = excess.argsort(dim=1, descending=True)
        saving = ((2 * size - 1) * (excess > 0)).gather(1, order)  # of the squared norm, by one level back
        surplus = size.square().sum(dim=1, keepdim=True) - radius**2
        needed = (saving.cumsum(dim=1) - saving < surplus) & (saving > 0)
        size = size - size.new_zeros(size.shape).scatter(1, order, needed.to(size.dtype))
        return (size * exact.sign()).view_as(moved)

    def contains_uint8(self, adversarial: Tensor, images: Tensor) -> Tensor:
        delta = (adversarial.long() - images.long()).flatten(1)
        return (delta * delta).sum(dim=1).double() <= (self.eps * 255) ** 2 + 1e-6


def _each(factor: Tensor, images: Tensor) -> Tensor:
    """A factor an image `(N,)`, in the shape that multiplies images."""
    return factor.view(-1, *[1] * (images.dim() - 1))
