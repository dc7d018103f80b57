"""Auto-PGD in L1, which finds its own sparsity besides its step size. Croce & Hein 2021 (ICML), section 3."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from dfmcl.robustness import losses
from dfmcl.robustness.attacks.trial import Trial
from dfmcl.robustness.threats.ball import Ball
from dfmcl.robustness.threats.l1 import sparse_steepest

PERIOD = 0.04  # of all steps: how often sparsity and step size are looked at
FIRST = 0.2  # of all values move in the first steps
SHRINK = 1.5  # by which both go down
SPARSER = 0.95  # of the values that moved: fewer now, and the step size begins anew
SHORTEST = 10  # a step is at least this part of eps


def run_l1(
    model: Callable[[Tensor], Tensor],
    x: Tensor,
    y: Tensor,
    target: Tensor,
    threat: Ball,
    generator: torch.Generator,
    loss: Callable[[Tensor, Tensor, Tensor], Tensor],
    steps: int,
    trial: Trial,
    rows: Tensor,
) -> tuple[Tensor, Tensor]:
    """As `apgd._run`: the best points `(N, C, H, W)` and their losses `(N,)`, inf where fooled.

    A step goes along the signs of the largest slopes only. How many is, at each checkpoint, as many values as the best
    point has moved, divided by `SHRINK`; while that number falls the step is eps long, else it becomes shorter.
    """
    values = max(x[0].numel(), 1) if len(x) else 1
    best, highest = x.clone(), x.new_full((len(x),), float("-inf"))
    best_gradient, point = torch.zeros_like(x), threat.start(x, generator)
    many, moved = x.new_full((len(x),), FIRST * values), x.new_full((len(x),), float(values))
    length = x.new_full((len(x),), threat.eps)
    left, period = torch.arange(len(x), device=x.device), max(1, int(PERIOD * steps))
    for step in range(steps + 1):
        if not len(left):
            break
        value, gradient, logits = losses.value_and_gradient(model, point, loss, (y[left], target[left]), step < steps)
        fooled = trial.look(rows[left], point, logits, gradient=step < steps)
        value = torch.where(fooled, torch.inf, value)
        better = value > highest[left]
        best[left[better]], highest[left[better]] = point[better], value[better]
        best_gradient[left[better]] = gradient[better]
        left, point, gradient = left[~fooled], point[~fooled], gradient[~fooled]
        if step and step % period == 0:
            now = (best[left] != x[left]).flatten(1).sum(dim=1).to(x.dtype)
            sparser = now < SPARSER * moved[left]
            many[left], moved[left] = (now / SHRINK).clamp_min(1), now
            shorter = (length[left] / SHRINK).clamp_min(threat.eps / SHORTEST)
            length[left] = torch.where(sparser, threat.eps, shorter)
            again = sparser.view(-1, *[1] * (x.dim() - 1))
            point = torch.where(again, best[left], point)
            gradient = torch.where(again, best_gradient[left], gradient)
        stride = length[left].view(-1, *[1] * (x.dim() - 1))
        point = threat.project(point + stride * sparse_steepest(gradient, many[left]), x[left])
    return best, highest
