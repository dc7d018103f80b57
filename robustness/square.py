"""Square Attack: random search over square patches, by scores alone. Andriushchenko et al. 2020 (ECCV)."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable

import torch
from torch import Tensor

from robustness.errors import BadInput
from robustness.losses import margin
from robustness.threat import Threat
from robustness.trial import Trial

# Where the patch's share of the image is halved, in ten-thousandths of all queries (section 5 of the paper).
HALVINGS = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)


def square(
    model: Callable[[Tensor], Tensor],
    x: Tensor,
    y: Tensor,
    threat: Threat,
    *,
    generator: torch.Generator,
    queries: int = 5000,
    p_init: float = 0.8,
    trial: Trial | None = None,
) -> Tensor:
    """Per image the first point that fools the model, else the one of highest margin. Linf only, else BadInput.

    Starts from vertical stripes of +-eps; each step proposes +-eps, one sign a channel, in a square of its own place
    per image, and keeps what raises the margin. One query per live image and step, `queries` at most; an image that is
    fooled leaves the batch at once. The gradient is never used, so that a masked one cannot mislead the attack.
    """
    if threat.norm != "linf":
        raise BadInput(f"square: knows Linf only, the threat is {threat}; take a Linf threat or leave square out")
    trial = trial or Trial(y)
    low, high = (x - threat.eps).clamp(0, 1), (x + threat.eps).clamp(0, 1)
    best, highest = x.clone(), x.new_full((len(x),), float("-inf"))
    alive = torch.arange(len(x), device=x.device)
    for query in range(queries):
        if not len(alive):
            break
        if query:
            side = patch_side(query - 1, queries, p_init, x.shape[2:])
            proposed = _patched(best[alive], low[alive], high[alive], side, generator)
        else:
            proposed = torch.where(_signs((len(x), x.shape[1], 1, x.shape[3]), x, generator), high, low)
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

    Proposals count from 0, so that even the shortest search begins with a large patch.
    """
    share = p_init / 2 ** bisect_left(HALVINGS, proposal * 10_000 // queries)
    return min(max(1, round(math.sqrt(share * size[0] * size[1]))), *size)


def _patched(current: Tensor, low: Tensor, high: Tensor, side: int, generator: torch.Generator) -> Tensor:
    """`current` with one square each at the ball's border, one sign a channel; never `current` itself."""
    count, channels, height, width = current.shape
    inside = _span(count, height, side, current, generator)[:, None, :, None]
    inside = inside & _span(count, width, side, current, generator)[:, None, None, :]
    up = _signs((count, channels, 1, 1), current, generator)
    proposed = torch.where(inside, torch.where(up, high, low), current)
    same = (proposed == current).flatten(1).all(dim=1).view(-1, 1, 1, 1)
    # A query that changes nothing is wasted: half of all on one channel, once the patch is one pixel.
    return torch.where(inside & same, torch.where(up, low, high), proposed)


def _span(count: int, length: int, side: int, like: Tensor, generator: torch.Generator) -> Tensor:
    """`side` places in a row out of `length`, at random for each image: `(count, length)` bool."""
    first = torch.randint(0, length - side + 1, (count, 1), generator=generator, device=like.device)
    place = torch.arange(length, device=like.device)
    return (place >= first) & (place < first + side)


def _signs(shape: tuple[int, ...], like: Tensor, generator: torch.Generator) -> Tensor:
    """A fair coin for each entry, bool."""
    return torch.randint(0, 2, shape, generator=generator, device=like.device).bool()
