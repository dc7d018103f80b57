"""RayS: the nearest adversarial image by labels alone, along rays to the corners of the cube. Chen & Gu 2020 (KDD)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from robustness.errors import BadInput
from robustness.geometry import norms, project
from robustness.threat import Threat
from robustness.trial import Trial

FINE = 1e-3  # where a search along a ray ends, the paper's; a quarter of a uint8 step


def rays(
    model: Callable[[Tensor], Tensor],
    x: Tensor,
    y: Tensor,
    threat: Threat,
    *,
    generator: torch.Generator,
    queries: int = 10_000,
    trial: Trial | None = None,
) -> Tensor:
    """Per image the first adversarial point inside the ball, else the nearest found, pulled back onto the ball.

    A direction is a sign for each value of the image. A proposal flips one block of them: the whole, its halves, its
    quarters and so on, in turn. Where the image is adversarial at the least distance so far along the proposal, a binary
    search finds how near it can be, and the direction is kept. One query per live image and step, `queries` at most;
    only the label of an answer is used. Deterministic; Linf only, else BadInput.
    """
    if threat.norm != "linf":
        raise BadInput(f"rays: knows Linf only, the threat is {threat}; take a Linf threat or leave rays out")
    trial = trial or Trial(y)
    nearest, least = x.clone(), x.new_full((len(x),), torch.inf)
    index = torch.arange(len(x), device=x.device)
    s = _Rays(x.flatten(1).shape[1] if len(x) else 1, x)
    for _ in range(queries):
        if not len(index):
            break
        radius = s.radius()
        point = (x[index] + radius.view(-1, 1, 1, 1) * s.proposal().view_as(x[index])).clamp(0, 1)
        with torch.no_grad():
            logits = model(point)
        crossed = logits.argmax(dim=1) != y[index]
        length = norms(point - x[index], "linf")
        better = crossed & (length < least[index])
        nearest[index[better]], least[index[better]] = point[better], length[better]
        inside = length <= threat.eps
        trial.spend(index[~inside], forward=1)
        done = torch.zeros_like(crossed)
        done[inside] = trial.look(index[inside], point[inside], logits[inside], gradient=False)
        nearest[index[done]] = point[done]
        s.learn(crossed, radius)
        s.keep(~done)
        index = index[~done]
    return project(nearest, x, threat)


class _Rays:
    """Where each live image's search stands; a row an image.

    direction `(M, D)`: the best signs so far; length `(M,)`: how far the image is from adversarial along them, 1 before
    anything was found, which reaches every corner of the box. block `(M, 2)`: level and place of the proposed flip.
    searching: whether the proposal is being measured, between `low` and `high`; first: the very first direction.
    """

    def __init__(self, size: int, x: Tensor) -> None:
        count = len(x)
        self.size = size
        self.direction = x.new_ones(count, size)
        self.length, self.low, self.high = x.new_ones(count), x.new_zeros(count), x.new_ones(count)
        self.block = torch.zeros(count, 2, dtype=torch.int64, device=x.device)
        self.searching = torch.zeros(count, dtype=torch.bool, device=x.device)
        self.first = torch.ones_like(self.searching)

    def radius(self) -> Tensor:
        return torch.where(self.searching, (self.low + self.high) / 2, self.length)

    def proposal(self) -> Tensor:
        place = torch.arange(self.size, device=self.block.device)
        begin, width = self._span()
        flipped = (place >= begin[:, None]) & (place < (begin + width)[:, None]) & ~self.first[:, None]
        return torch.where(flipped, -self.direction, self.direction)

    def learn(self, crossed: Tensor, radius: Tensor) -> None:
        """crossed `(M,)`: whether the image was adversarial at `radius` `(M,)` along its proposal."""
        self.high = torch.where(crossed, radius, self.high)
        self.low = torch.where(self.searching, torch.where(crossed, self.low, radius), 0)
        self.searching = self.searching | crossed
        found = self.searching & (self.high - self.low <= FINE)
        self.direction = torch.where(found[:, None], self.proposal(), self.direction)
        self.length = torch.where(found, self.high, self.length)
        over = found | ~self.searching
        self.searching = self.searching & ~found
        self._advance(over & ~self.first)
        self.first = self.first & ~over

    def keep(self, rows: Tensor) -> None:
        for name in ("direction", "length", "low", "high", "block", "searching", "first"):
            setattr(self, name, getattr(self, name)[rows])

    def _span(self) -> tuple[Tensor, Tensor]:
        """First place and width of each proposed block `(M,)`."""
        parts = 2 ** self.block[:, 0]
        width = (self.size + parts - 1) // parts
        return self.block[:, 1] * width, width

    def _advance(self, rows: Tensor) -> None:
        """The next block; after the last one the first of half the width, once single values are through as well."""
        begin, width = self._span()
        last = begin + width >= self.size
        deeper = torch.where(width > 1, self.block[:, 0] + 1, 0)
        after = torch.where(last[:, None], torch.stack([deeper, torch.zeros_like(deeper)], dim=1), self.block)
        after[:, 1] += (~last).to(after.dtype)
        self.block = torch.where(rows[:, None], after, self.block)
