"""Do gradients account for answers? Along a segment, f(b) - f(a) is the integral of the gradient, whatever f is.

A network of continuous layers keeps that law up to the error of the sum that stands for the integral. A model that
switches between two networks, shows the gradient of another one, or adds a step to its logits breaks it on each
segment that crosses the switch, the lie or the step.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from dfmcl.robustness.losses import margin, value_and_gradient
from dfmcl.robustness.portions import answered

POINTS = 16  # of the sum along a segment, at first
MORE = 64  # where that leaves too much: ReLUs change sides on a long way, and the sum gets better


def unexplained(
    model: nn.Module,
    decide: Callable[[Tensor], Tensor],
    begin: Tensor,
    end: Tensor,
    y: Tensor,
    *,
    enough: float,
    rounding: float = 0.0,
) -> Tensor:
    """The share of each change that gradients do not account for: `(N,)`, on the CPU; 0 where nothing changes.

    The change is that of the margin to class y from begin to end, images `(N, C, H, W)`, by the answers that count; the
    sum is that of the model's gradients at the middles of equal parts of the way. Their distance is measured in the
    larger of the change and of the way that the margin went up and down by the sum. NaN counts as 1.
    enough: a share that is not looked at more closely.
    rounding: the part of a change that rounded answers make, which gradients need not explain.
    """
    share = _share(model, decide, begin, end, y, POINTS, rounding)
    rows = torch.nonzero(share > enough).squeeze(1)
    if len(rows):
        at = rows.to(begin.device)
        share[rows] = torch.minimum(share[rows], _share(model, decide, begin[at], end[at], y[at], MORE, rounding))
    return share


def _share(
    model: nn.Module,
    decide: Callable[[Tensor], Tensor],
    begin: Tensor,
    end: Tensor,
    y: Tensor,
    points: int,
    rounding: float,
) -> Tensor:
    way = end - begin
    total, walked = (torch.zeros(len(begin), dtype=torch.float64) for _ in range(2))
    for part in range(points):
        _, gradient, _ = value_and_gradient(model, begin + (part + 0.5) / points * way, margin, (y,), True)
        step = (gradient * way).flatten(1).sum(dim=1).double().cpu() / points
        total += step
        walked += step.abs()
    first, last = (margin(answered(decide, point), y.cpu()).double() for point in (begin, end))
    change = last - first
    share = ((change - total).abs() - rounding).clamp_min(0) / torch.maximum(change.abs(), walked)
    return torch.where((change == 0) & (walked == 0), 0.0, share.nan_to_num(nan=1.0, posinf=1.0))
