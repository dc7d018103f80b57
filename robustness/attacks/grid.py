"""All transforms by turns, or some at random: the worst case over a finite threat, by answers alone."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from dfmcl.common.errors import BadInput
from dfmcl.robustness.attacks.trial import Trial
from dfmcl.robustness.losses import margin
from dfmcl.robustness.threats.threat import Threat, as_levels
from dfmcl.robustness.threats.transforms import Transforms


def grid(
    model: Callable[[Tensor], Tensor],
    x: Tensor,
    y: Tensor,
    threat: Threat,
    *,
    generator: torch.Generator,
    queries: int | None = None,
    trial: Trial | None = None,
) -> Tensor:
    """Per image the first transform that fools the model, else the one of highest margin.

    All of them where queries is None or no smaller: the exact worst case. Else so many, drawn for each image without
    repetition. One query per live image and transform; an image that is fooled leaves the batch at once. x must lie on
    the uint8 grid; BadInput where the threat is no finite one.
    """
    if not isinstance(threat, Transforms):
        raise BadInput(f"grid: {threat} has no list of transforms; take one such as rotation:30 or fog@3")
    trial = trial or Trial(y)
    images, whole = as_levels(x), threat.count(tuple(x.shape[1:]))
    best, highest = x.clone(), x.new_full((len(x),), float("-inf"))
    numbers = torch.arange(whole, device=x.device).expand(len(x), -1)
    if queries is not None and queries < whole:
        chance = torch.rand(len(x), whole, generator=generator, device=x.device)
        numbers = chance.argsort(dim=1)[:, :queries]
    alive = torch.arange(len(x), device=x.device)
    for turn in range(numbers.shape[1]):
        if not len(alive):
            break
        points = threat.transformed(images[alive], numbers[alive, turn]).to(x.dtype) / 255
        with torch.no_grad():
            logits = model(points)
        value = margin(logits, y[alive])
        done = trial.look(alive, points, logits, gradient=False)
        value = torch.where(done, torch.inf, value)
        better = value > highest[alive]
        best[alive[better]], highest[alive[better]] = points[better], value[better]
        alive = alive[~done]
    return best
