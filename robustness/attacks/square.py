"""Square Attack: random search over square patches, by scores alone. Andriushchenko et al. 2020 (ECCV)."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable

import torch
from torch import Tensor

from dfmcl.robustness.attacks.trial import Trial
from dfmcl.robustness.losses import margin
from dfmcl.robustness.threats.ball import Ball
from dfmcl.robustness.threats.l2 import L2
from dfmcl.robustness.threats.registry import by_norm

# Where the patch's share of the image is halved, in ten-thousandths of all queries (section 5 of the paper).
HALVINGS = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)
# A search of fewer queries goes through the beginning of this one's schedule, and has no time for single pixels.
SHORTEST = 2000


def square(
    model: Callable[[Tensor], Tensor],
    x: Tensor,
    y: Tensor,
    threat: Ball,
    *,
    generator: torch.Generator,
    queries: int = 5000,
    p_init: float = 0.8,
    trial: Trial | None = None,
) -> Tensor:
    """Per image the first point that fools the model, else the one of highest margin.

    Linf: starts from vertical stripes of +-eps; each step proposes +-eps, one sign a channel, in a square. L2: starts
    from a tiling by bumps; each step takes what one square holds of the radius, and what the box left unused, to raise
    a bump in another. Squares lie elsewhere in each image; what raises the margin is kept. One query per live image
    and step, `queries` at most; an image that is fooled leaves the batch at once. The gradient is never used, so that
    a masked one cannot mislead the attack.
    """
    begin, propose = by_norm(SEARCHES, threat.norm, "square")
    trial = trial or Trial(y)
    best, highest = x.clone(), x.new_full((len(x),), float("-inf"))
    alive = torch.arange(len(x), device=x.device)
    for query in range(queries):
        if not len(alive):
            break
        if query:
            side = patch_side(query - 1, queries, p_init, x.shape[2:])
            proposed = propose(best[alive], x[alive], threat, side, generator)
        else:
            proposed = begin(x, threat, generator)
        with torch.no_grad():
            logits = model(proposed)
        value = margin(logits, y[alive])
        done = trial.look(alive, proposed, logits, gradient=False)
        value = torch.where(done, torch.inf, value)
        better = value > highest[alive]
        best[alive[better]], highest[alive[better]] = proposed[better], value[better]
        alive = alive[~done]
    return best


def patch_side(proposal: int, queries: int, p_init: float, size: tuple[int, ...]) -> int:
    """Side of a proposal's patch in pixels, sqrt(p H W): the share p shrinks from p_init to p_init / 512.

    Proposals count from 0, so that even the shortest search begins with a large patch. Below `SHORTEST` queries p
    shrinks as in a search of that many, so not to its end: of 200 digits 100 queries break 15 and not 9.
    """
    share = p_init / 2 ** bisect_left(HALVINGS, proposal * 10_000 // max(queries, SHORTEST))
    return min(max(1, round(math.sqrt(share * size[0] * size[1]))), *size)


def _striped(x: Tensor, threat: Ball, generator: torch.Generator) -> Tensor:
    """Vertical stripes of +-eps, one sign a column and channel."""
    up = signs((len(x), x.shape[1], 1, x.shape[3]), x, generator)
    return torch.where(up, x + threat.eps, x - threat.eps).clamp(0, 1)


def _patched(current: Tensor, x: Tensor, threat: Ball, side: int, generator: torch.Generator) -> Tensor:
    """`current` with one square each at the ball's border."""
    return patched(current, (x - threat.eps).clamp(0, 1), (x + threat.eps).clamp(0, 1), side, generator)


def patched(current: Tensor, low: Tensor, high: Tensor, side: int, generator: torch.Generator) -> Tensor:
    """`current` `(N, C, H, W)` with one square each at `low` or `high`, one sign a channel; never `current` itself."""
    count, channels, height, width = current.shape
    inside = _span(count, height, side, current, generator)[:, None, :, None]
    inside = inside & _span(count, width, side, current, generator)[:, None, None, :]
    up = signs((count, channels, 1, 1), current, generator)
    proposed = torch.where(inside, torch.where(up, high, low), current)
    same = (proposed == current).flatten(1).all(dim=1).view(-1, 1, 1, 1)
    # A query that changes nothing is wasted: half of all on one channel, once the patch is one pixel.
    return torch.where(inside & same, torch.where(up, low, high), proposed)


def _tiled(x: Tensor, threat: Ball, generator: torch.Generator) -> Tensor:
    """Five by five bumps, each with a sign a channel, scaled to the radius; a rest at the border stays."""
    count, channels, height, width = x.shape
    delta = torch.zeros_like(x)
    side = max(1, min(height, width) // 5)
    for top in range(height % side // 2, height - side + 1, side):
        for left in range(width % side // 2, width - side + 1, side):
            bump = _bumps(count, channels, side, x, generator)
            delta[:, :, top : top + side, left : left + side] = bump
    return _at_radius(x, delta, threat)


def _shifted(current: Tensor, x: Tensor, threat: Ball, side: int, generator: torch.Generator) -> Tensor:
    """`current` with the radius moved from one square to another, where a bump is added. Algorithm 3 of the paper.

    Each channel of the bump gets the length that all had together, before the whole is brought to the radius: so does
    AutoAttack's, not the paper's, and of 200 digits 2.4 fewer hold (300 queries, six seeds).
    """
    count, channels, height, width = current.shape
    side = min(side if side % 2 else side + 1, height, width)
    side = max(side, min(3, height, width))
    delta = current - x
    (to_rows, to_columns), (from_rows, from_columns) = (
        tuple(_span(count, length, side, x, generator) for length in (height, width)) for _ in range(2)
    )
    into = to_rows[:, None, :, None] & to_columns[:, None, None, :]
    out_of = from_rows[:, None, :, None] & from_columns[:, None, None, :]
    unused = (threat.eps**2 - L2.lengths(delta).square()).clamp_min(0).view(-1, 1, 1, 1)
    there = (delta * (into | out_of)).square().sum(dim=(1, 2, 3), keepdim=True)
    radius = (there + unused / channels).sqrt()
    old = delta[into.expand_as(delta)].view(count, channels, side, side)
    new = _of_length(old, 1) + _bumps(count, channels, side, x, generator)
    delta = delta.masked_fill(out_of, 0).masked_scatter(into, _of_length(new, radius))
    return _at_radius(x, delta, threat)


def _bumps(count: int, channels: int, side: int, like: Tensor, generator: torch.Generator) -> Tensor:
    """Two neighbouring pyramids of opposite sign, one above or beside the other, a sign a channel; of length 1.

    `(count, channels, side, side)`. A pyramid falls off by squares, with the distance in the maximum norm.
    """
    halves = []
    for height in (side // 2, side - side // 2):
        rows = (torch.arange(height, device=like.device) - height // 2).abs()
        columns = (torch.arange(side, device=like.device) - side // 2).abs()
        layers = torch.arange(1, max(height, side) // 2 + 2, device=like.device, dtype=like.dtype).square().reciprocal()
        height_at = layers.flip(0).cumsum(0).flip(0)  # of the layers that reach so far
        half = height_at[torch.maximum(rows[:, None], columns)]
        halves.append(_of_length(half[None, None], 1)[0, 0] if height else half)
    bump = _of_length(torch.cat([halves[0], -halves[1]])[None, None], 1)
    upright = signs((count, 1, 1, 1), like, generator)
    bump = torch.where(upright, bump, bump.transpose(2, 3))
    return torch.where(signs((count, channels, 1, 1), like, generator), bump, -bump)


def _of_length(windows: Tensor, length: Tensor | float) -> Tensor:
    """Each channel's window `(N, C, H, W)` scaled to an L2 norm; one that is all zero stays so."""
    return windows * (length / windows.square().sum(dim=(2, 3), keepdim=True).sqrt().clamp_min(1e-12))


def _at_radius(x: Tensor, delta: Tensor, threat: Ball) -> Tensor:
    """x + delta with the length of delta stretched to the radius, in the box."""
    factor = threat.eps / L2.lengths(delta).clamp_min(1e-12)
    return threat.project(x + delta * factor.view(-1, 1, 1, 1), x)


Begin = Callable[[Tensor, Ball, torch.Generator], Tensor]
Propose = Callable[[Tensor, Tensor, Ball, int, torch.Generator], Tensor]
SEARCHES: dict[str, tuple[Begin, Propose]] = {"linf": (_striped, _patched), "l2": (_tiled, _shifted)}


def _span(count: int, length: int, side: int, like: Tensor, generator: torch.Generator) -> Tensor:
    """`side` places in a row out of `length`, at random for each image: `(count, length)` bool."""
    first = torch.randint(0, length - side + 1, (count, 1), generator=generator, device=like.device)
    place = torch.arange(length, device=like.device)
    return (place >= first) & (place < first + side)


def signs(shape: tuple[int, ...], like: Tensor, generator: torch.Generator) -> Tensor:
    """A fair coin for each entry, bool."""
    return torch.randint(0, 2, shape, generator=generator, device=like.device).bool()
