"""L1: the absolute changes of all values of the image add up to eps at most."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dfmcl.robustness.threats.ball import Ball

if TYPE_CHECKING:
    import torch
    from torch import Tensor


@dataclass(frozen=True)
class L1(Ball):
    kind, name, heads, examples = "l1", "L1", ("l1",), ("l1:12",)
    most = math.inf
    slack = 1e-3  # a sum over 150,000 values; most did not move
    level = 1 / 255

    @property
    def levels(self) -> int:
        """By how many whole grey levels all values together may move."""
        return math.floor(self.eps * 255 + 1e-6)  # 1e-6: 12/255 * 255 must stay 12 in floating point

    @staticmethod
    def lengths(delta: Tensor) -> Tensor:
        return delta.flatten(1).abs().sum(dim=1)

    @staticmethod
    def diameter(values: int) -> float:
        return float(values)

    @staticmethod
    def steepest(gradient: Tensor) -> Tensor:
        """The one value of largest slope; attacks take `sparse_steepest`, as [0, 1] soon stops a single value."""
        import torch

        return sparse_steepest(gradient, torch.ones_like(gradient.flatten(1)[:, 0]))

    def start(self, x: Tensor, generator: torch.Generator) -> Tensor:
        """A normal draw around x, projected: unlike a uniform draw it moves few values, as the best points do."""
        import torch

        noise = torch.randn(x.shape, generator=generator, device=x.device, dtype=x.dtype)
        return self.project(x + noise, x)

    def project(self, x_adv: Tensor, x: Tensor) -> Tensor:
        """Onto ball and box at once: each change shrinks by one and the same length, then meets the box.

        That length solves a piecewise linear equation, whose corners are sorted. Croce & Hein 2021 (ICML), section 2.
        """
        delta = (x_adv - x).double().flatten(1)
        size, room = delta.abs(), ((delta > 0).double() - x.double().flatten(1)).abs()
        shrink = _shrinkage(size, room, self.eps)
        kept = (size - shrink[:, None]).clamp_min(0) * delta.sign()
        return (x + kept.to(x.dtype).view_as(x)).clamp(0, 1)

    def on_grid(self) -> L1:
        return L1(self.levels / 255)

    def whole_levels(self, moved: Tensor) -> Tensor:
        """The nearest; where that leaves the ball, values that were rounded away from 0 go one level back, those first
        that were rounded farthest, until the image is inside."""
        exact = moved.flatten(1)
        size = exact.abs().round()
        excess = size - exact.abs()  # above 0 where rounding went outwards
        order = excess.argsort(dim=1, descending=True)
        surplus = (size.sum(dim=1, keepdim=True) - self.levels).clamp_min(0)
        rank = order.argsort(dim=1)
        size = size - ((rank < surplus) & (excess > 0)).to(size.dtype)
        return (size * exact.sign()).view_as(moved)

    def contains_uint8(self, adversarial: Tensor, images: Tensor) -> Tensor:
        return self.lengths(adversarial.long() - images.long()) <= self.levels


def sparse_steepest(gradient: Tensor, count: Tensor) -> Tensor:
    """A step of length 1 along the signs of the `count` largest slopes of each image; count `(N,)`, at least 1."""
    flat = gradient.flatten(1)
    whole = count.long().clamp(1, max(flat.shape[1], 1))[:, None]
    rank = flat.abs().argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    return ((rank < whole) * flat.sign() / whole).view_as(gradient)


def _shrinkage(size: Tensor, room: Tensor, eps: float) -> Tensor:
    """The least t >= 0 for which clip(size - t, 0, room) sums to eps at most, exactly; `(N, D)` x 2 -> `(N,)`.

    The sum falls along t with as many values as have begun to fall (at size - room) and are not yet 0 (at size).
    """
    import torch

    corners, order = torch.cat([(size - room).clamp_min(0), size], dim=1).sort(dim=1)
    begins = order < size.shape[1]
    falling = torch.where(begins, 1.0, -1.0).double().cumsum(dim=1)  # after each corner
    first = corners.new_zeros(len(corners), 1)
    lengths = torch.diff(corners, dim=1, prepend=first)
    lost = (lengths * torch.cat([first, falling[:, :-1]], dim=1)).cumsum(dim=1)
    surplus = (size.minimum(room).sum(dim=1) - eps).clamp_min(0)
    place = (lost < surplus[:, None]).sum(dim=1, keepdim=True).clamp(1, max(corners.shape[1] - 1, 1))
    before, rate = place - 1, falling.gather(1, place - 1).clamp_min(1)
    shrink = corners.gather(1, before) + (surplus[:, None] - lost.gather(1, before)) / rate
    return torch.where(surplus > 0, shrink[:, 0], 0)
