"""Patch-RS: random search over the place and the content of a patch, by scores. Croce et al. 2022 (AAAI), section 5."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from dfmcl.common.errors import BadInput
from dfmcl.robustness.attacks.patch import square
from dfmcl.robustness.attacks.square import patch_side, signs
from dfmcl.robustness.attacks.trial import Trial
from dfmcl.robustness.losses import margin
from dfmcl.robustness.threats.patch import Patch
from dfmcl.robustness.threats.threat import Threat

MOVES = 5  # each fifth proposal moves the patch, the others change a square in it
FIRST = 0.4  # share of the patch that the first changes cover
LAYERS = 2  # times the side: squares of random colours, one on the other, that a search begins with


def patch_rs(
    model: Callable[[Tensor], Tensor],
    x: Tensor,
    y: Tensor,
    threat: Threat,
    *,
    generator: torch.Generator,
    queries: int = 10_000,
    trial: Trial | None = None,
) -> Tensor:
    """Per image the first point that fools the model, else the one of highest margin.

    It begins with squares of random colours at a random place. A proposal is either another place, within a reach that
    shrinks from the whole image to a pixel, or a square of one colour inside the patch, whose share shrinks as in the
    Square Attack. Colours are corners of the cube, 0 or 1 a channel, so that bytes hold them. What raises the margin is
    kept. One query per live image and step, `queries` at most; an image that is fooled leaves the batch at once.
    BadInput where the threat is no patch.
    """
    if not isinstance(threat, Patch):
        raise BadInput(f"patch-rs: the threat is {threat}; take one such as patch:5x5")
    trial = trial or Trial(y)
    best, highest = x.clone(), x.new_full((len(x),), float("-inf"))
    if not len(x):
        return best
    side, (height, width) = threat.pixels(tuple(x.shape[1:])), x.shape[2:]
    size = x.new_tensor([height - side + 1, width - side + 1]).long()
    content, corner = _coloured(x, side, generator), anywhere(len(x), size, x, generator)
    alive = torch.arange(len(x), device=x.device)
    for query in range(queries):
        if not len(alive):
            break
        inner, place = content[alive], corner[alive]
        if query and query % MOVES == 0:
            place = _moved(place, size, 1 - query / queries, generator)
        elif query:
            inner = _recoloured(inner, patch_side(query - 1, queries, FIRST, (side, side)), generator)
        points = pasted(x[alive], inner, place)
        with torch.no_grad():
            logits = model(points)
        value = margin(logits, y[alive])
        done = trial.look(alive, points, logits, gradient=False)
        value = torch.where(done, torch.inf, value)
        better = value >= highest[alive]
        chosen = alive[better]
        best[chosen], highest[chosen] = points[better], value[better]
        content[chosen], corner[chosen] = inner[better], place[better]
        alive = alive[~done]
    return best


def pasted(x: Tensor, content: Tensor, corner: Tensor) -> Tensor:
    """Images `(N, C, H, W)` with squares `(N, C, s, s)` at top left corners `(N, 2)`."""
    side, width = content.shape[2], x.shape[3]
    inside = square(x, corner[:, 0] * width + corner[:, 1], side)
    return x.masked_scatter(inside, content)


def _coloured(x: Tensor, side: int, generator: torch.Generator) -> Tensor:
    """Squares of random colours on each other, `(N, C, side, side)`."""
    content = signs((len(x), x.shape[1], 1, 1), x, generator).to(x.dtype).expand(-1, -1, side, side)
    for _ in range(LAYERS * side):
        inner = int(torch.randint(1, side + 1, (), generator=generator, device=x.device))
        content = _recoloured(content, inner, generator)
    return content.contiguous()


def _recoloured(content: Tensor, inner: int, generator: torch.Generator) -> Tensor:
    """With one square of one colour in each."""
    count, channels, side, _ = content.shape
    size = torch.full((2,), side - inner + 1, device=content.device)
    corner = anywhere(count, size, content, generator)
    colour = signs((count, channels, 1, 1), content, generator).to(content.dtype)
    inside = square(content, corner[:, 0] * side + corner[:, 1], inner)
    return torch.where(inside, colour, content)


def anywhere(count: int, size: Tensor, like: Tensor, generator: torch.Generator) -> Tensor:
    """Random places `(count, 2)`, each coordinate below its size."""
    uniform = torch.rand(count, 2, generator=generator, device=like.device)
    return (uniform * size).long().minimum(size - 1)


def _moved(corner: Tensor, size: Tensor, share: float, generator: torch.Generator) -> Tensor:
    """Places `(N, 2)` elsewhere, within that share of the way across."""
    reach = max(1, math.floor(share * int(size.max())))
    uniform = torch.rand(corner.shape, generator=generator, device=corner.device)
    step = (uniform * (2 * reach + 1)).long().clamp(max=2 * reach) - reach
    return (corner + step).clamp_min(0).minimum(size - 1)
