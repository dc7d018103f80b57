"""One patch for many images and places, made on another network and sent as it is. Brown et al. 2017."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from dfmcl.common.errors import BadInput
from dfmcl.robustness.attacks.patch import LONGEST, MOMENTUM, SHORTEST, square
from dfmcl.robustness.attacks.patch_rs import anywhere
from dfmcl.robustness.attacks.trial import Trial
from dfmcl.robustness.losses import margin, value_and_gradient
from dfmcl.robustness.threats.patch import Patch
from dfmcl.robustness.threats.threat import Threat

PLACES = 4  # that the network is asked about for each image, once the patch is made
ENOUGH = 1.0  # a margin beyond which an image asks no more of the patch, in units of the spread of its logits


def universal_patch(
    model: Callable[[Tensor], Tensor],
    x: Tensor,
    y: Tensor,
    threat: Threat,
    *,
    generator: torch.Generator,
    steps: int = 100,
    trial: Trial | None = None,
) -> Tensor:
    """All images `(N, C, H, W)` with the same square of values, each where it fools the model most of a few places.

    The square begins at random values and takes `steps` steps by sign, from half of the range to a twentieth of it, up
    the gradient of the margins of all images, at another random place in each image at every step. An image that is
    fooled by far asks no more of it. No image is given up before the end, as the square is for all of them. Each image
    costs steps + PLACES forward and steps backward passes. BadInput where the threat is no patch.
    """
    if not isinstance(threat, Patch):
        raise BadInput(f"universal-patch: the threat is {threat}; take one such as patch:5x5")
    trial = trial or Trial(y)
    if not len(x):
        return x.clone()
    rows, side = torch.arange(len(x), device=x.device), threat.pixels(tuple(x.shape[1:]))
    values = torch.rand(1, x.shape[1], side, side, generator=generator, device=x.device, dtype=x.dtype)
    velocity = torch.zeros_like(values)
    for step in range(steps):
        point, inside = _placed(x, values, generator)
        _, gradient, _ = value_and_gradient(model, point, _urge, (y,), True)
        trial.spend(rows, forward=1, backward=1)
        wanted = gradient[inside].view(len(x), *values.shape[1:]).sum(dim=0)
        velocity = MOMENTUM * velocity + wanted / wanted.abs().sum().clamp_min(1e-12)
        length = SHORTEST + (LONGEST - SHORTEST) * (1 - step / steps)
        values = (values + length * velocity.sign()).clamp(0, 1)
    best, highest = x.clone(), x.new_full((len(x),), float("-inf"))
    for _ in range(PLACES):
        if not len(rows):
            break
        point, _ = _placed(x[rows], values, generator)
        with torch.no_grad():
            logits = model(point)
        fooled = trial.look(rows, point, logits, gradient=False)
        value = torch.where(fooled, torch.inf, margin(logits, y[rows]))
        better = value > highest[rows]
        best[rows[better]], highest[rows[better]] = point[better], value[better]
        rows = rows[~fooled]
    return best


def _urge(logits: Tensor, y: Tensor) -> Tensor:
    """The margin by the spread of the image's own logits, up to ENOUGH."""
    return (margin(logits, y) / logits.detach().std(dim=1).clamp_min(1e-12)).clamp(max=ENOUGH)


def _placed(x: Tensor, values: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Images with the square somewhere, and its pixels: `(N, C, H, W)` each."""
    (height, width), side = x.shape[2:], values.shape[2]
    size = torch.tensor([height - side + 1, width - side + 1], device=x.device)
    corner = anywhere(len(x), size, x, generator)
    inside = square(x, corner[:, 0] * width + corner[:, 1], side)
    return x.masked_scatter(inside, values.expand(len(x), -1, -1, -1).contiguous()), inside
