"""RayS: search by labels alone, along rays to the corners of the cube. Chen & Gu 2020 (KDD), algorithms 2 and 3."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from dfmcl.common.errors import BadInput
from dfmcl.robustness.attacks.trial import Trial
from dfmcl.robustness.threats.ball import Ball
from dfmcl.robustness.threats.linf import Linf

PRECISION = 1e-3  # of eps: how exactly the radius at which a ray crosses the border is found


def rays(
    model: Callable[[Tensor], Tensor],
    x: Tensor,
    y: Tensor,
    threat: Ball,
    *,
    generator: torch.Generator,
    queries: int = 10_000,
    trial: Trial | None = None,
) -> Tensor:
    """Per image the first point of the ball that fools the model, else the ball's corner on the nearest ray found.

    A ray is a sign for each value of the image, and known by the radius at which it crosses the border. A proposal
    turns the signs of one block: the whole image, its halves, its quarters and so on, in turn. Where the turned ray is
    across at the known radius it is kept, and a binary search tells how much nearer it crosses; the search ends at eps,
    as anything inside the ball will do. One query per live image and step, `queries` at most; an image that is fooled
    leaves the batch at once. Only the label of an answer is used. Deterministic; Linf only, else BadInput.
    """
    if not isinstance(threat, Linf):
        raise BadInput(f"rays: knows Linf only, the threat is {threat}; take a Linf threat or leave rays out")
    trial, size = trial or Trial(y), x.shape[1:].numel()
    precision = PRECISION * threat.eps
    first, last = blocks(size, x.device)
    place = torch.arange(size, device=x.device)
    sign, found = x.new_ones(len(x), size), x.clone()
    inner = x.new_full((len(x),), threat.eps - precision)
    outer = torch.ones_like(inner)  # at radius 1 every pixel is black or white: no ray leads farther
    proposal, halving = torch.zeros_like(y), torch.zeros_like(y, dtype=torch.bool)
    alive = torch.arange(len(x), device=x.device)
    for _ in range(queries):
        if not len(alive):
            break
        block, known = proposal[alive], halving[alive]
        turned = ~known[:, None] & (place >= first[block][:, None]) & (place < last[block][:, None])
        direction = torch.where(turned, -sign[alive], sign[alive])
        asked = torch.where(known, (inner[alive] + outer[alive]) / 2, outer[alive])
        points = _along(x[alive], direction, asked)
        with torch.no_grad():
            logits = model(points)
        near = asked <= threat.eps
        done = torch.zeros_like(near)
        done[near] = trial.look(alive[near], points[near], logits[near], gradient=False)
        trial.spend(alive[~near], forward=1)
        found[alive[done]] = points[done]
        across = (logits.argmax(dim=1) != y[alive]) & ~near  # a point of the ball that did not count is not across
        sign[alive[across]], outer[alive[across]] = direction[across], asked[across]
        short = known & ~across
        inner[alive[short]] = asked[short]
        wide = outer[alive] - inner[alive] > precision
        halving[alive] = torch.where(known, wide, across)
        inner[alive[~halving[alive]]] = threat.eps - precision
        proposal[alive[~known]] = block[~known] % (len(first) - 1) + 1  # after single values the whole image again
        alive = alive[~done]
    found[alive] = _along(x[alive], sign[alive], x.new_full((len(alive),), threat.eps))
    return found


def blocks(size: int, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
    """Where each proposal's block begins and ends in `size` values: nothing, all, the halves, ..., single ones."""
    edges, count = [(0, 0)], 1
    while edges[-1] != (size - 1, size):
        edges += [(i * size // count, (i + 1) * size // count) for i in range(count)]
        count = min(2 * count, size)
    first, last = torch.tensor(edges, device=device).unbind(dim=1)
    return first, last


def _along(x: Tensor, direction: Tensor, radius: Tensor) -> Tensor:
    """The point at a radius `(M,)` along a direction of signs `(M, C H W)`, in [0, 1]."""
    return (x + (radius[:, None] * direction).view_as(x)).clamp(0, 1)
