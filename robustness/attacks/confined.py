"""Attacks that never leave a subspace in which the data live.

A network that answers otherwise where R != G, where there are high frequencies, or at values that the data never have
shows every ordinary attack its other face, as their steps and random starts leave the subspace. Here no point does.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from dfmcl.robustness.attacks.square import SEARCHES, patch_side, patched, signs
from dfmcl.robustness.attacks.subspaces import Chart, Subspace, chart_of, interpolated, subspaces
from dfmcl.robustness.attacks.trial import Trial
from dfmcl.robustness.losses import margin, value_and_gradient
from dfmcl.robustness.threats.ball import Ball
from dfmcl.robustness.threats.l2 import L2
from dfmcl.robustness.threats.registry import by_norm

Model = Callable[[Tensor], Tensor]

STRIDE = 2.5  # of the radius: what all steps together go, as in Madry et al. 2018


def subspace(
    model: Model,
    x: Tensor,
    y: Tensor,
    threat: Ball,
    *,
    generator: torch.Generator,
    steps: int = 10,
    restarts: int = 1,
    within: Mapping[str, Subspace] | None = None,
    trial: Trial | None = None,
) -> Tensor:
    """Projected gradient ascent on the margin in each subspace of the images by turns, each on what those before left.

    Per image the first point that fools the model, else the one of highest margin. It starts at the image itself, where
    a network shows the face that users meet; further restarts are at random. within: other subspaces than all of
    `subspaces.subspaces(x)`. Each costs steps + 1 forward and steps backward passes for an image that holds.
    """
    kept = _Best(x, y, trial or Trial(y))
    spaces = {**subspaces(x), **interpolated(x, threat)} if within is None else within
    for space in spaces.values():
        chart = chart_of(space, x, threat)
        for restart in range(restarts):
            begin = chart.start(generator) if restart else torch.zeros_like(chart.lower)
            _climb(model, chart, begin, steps, kept)
    return kept.points


def square_subspace(
    model: Model,
    x: Tensor,
    y: Tensor,
    threat: Ball,
    *,
    generator: torch.Generator,
    queries: int = 5000,
    p_init: float = 0.8,
    within: Mapping[str, Subspace] | None = None,
    trial: Trial | None = None,
) -> Tensor:
    """Square Attack in each subspace of the images by turns: squares of coordinates, by scores alone.

    The queries are shared out evenly among all of `subspaces.subspaces(x)`, or those `within`. Per image the first
    point that fools the model, else the one of highest margin.
    """
    kept = _Best(x, y, trial or Trial(y))
    found = list((subspaces(x) if within is None else within).values())
    for number, space in enumerate(found):
        share = queries // len(found) + (number < queries % len(found))
        _search(model, chart_of(space, x, threat), share, p_init, generator, kept)
    return kept.points


class _Best:
    """What all turns have found: points `(N, C, H, W)` and their margins `(N,)`, inf where one fooled."""

    def __init__(self, x: Tensor, y: Tensor, trial: Trial) -> None:
        self.points, self.y, self.trial = x.clone(), y, trial
        self.margins = x.new_full((len(x),), float("-inf"))

    @property
    def left(self) -> Tensor:
        """Rows of the images that hold."""
        return torch.nonzero(self.margins < torch.inf).squeeze(1)

    def look(self, rows: Tensor, points: Tensor, value: Tensor, logits: Tensor, *, gradient: bool) -> Tensor:
        """Keep what is better of points of rows `(M,)`; who goes on, `(M,)` bool."""
        fooled = self.trial.look(rows, points, logits, gradient=gradient)
        value = torch.where(fooled, torch.inf, value)
        better = value > self.margins[rows]
        self.points[rows[better]], self.margins[rows[better]] = points[better], value[better]
        return ~fooled


def _climb(model: Model, chart: Chart, begin: Tensor, steps: int, kept: _Best) -> None:
    rows = kept.left
    chart, free, length = chart.of(rows), begin[rows], STRIDE * chart.threat.eps / steps
    for step in range(steps + 1):
        if not len(rows):
            break
        with torch.set_grad_enabled(step < steps):
            free = free.detach().requires_grad_(step < steps)
            points = chart.images(free)
        value, gradient, logits = value_and_gradient(model, points, margin, (kept.y[rows],), step < steps)
        stay = kept.look(rows, points.detach(), value, logits, gradient=step < steps)
        if step == steps:
            break
        (gradient,) = torch.autograd.grad(points, free, gradient)  # from images to coordinates
        rows, chart, free = rows[stay], chart.of(stay), free.detach()[stay]
        free = chart.project(free + length * chart.steepest(gradient[stay]))


def _search(model: Model, chart: Chart, queries: int, p_init: float, generator: torch.Generator, kept: _Best) -> None:
    rows, propose = kept.left, by_norm(PROPOSALS, chart.threat.norm, "square-subspace")
    chart = chart.of(rows)
    best, highest = chart.lower.clone(), chart.x.new_full((len(rows),), float("-inf"))
    for query in range(queries):
        if not len(rows):
            break
        proposed = propose(chart, best, query, patch_side(query - 1, queries, p_init, best.shape[2:]), generator)
        points = chart.images(proposed)
        with torch.no_grad():
            logits = model(points)
        value = margin(logits, kept.y[rows])
        stay = kept.look(rows, points, value, logits, gradient=False)
        better = value > highest
        best[better], highest[better] = proposed[better], value[better]
        rows, chart, best, highest = rows[stay], chart.of(stay), best[stay], highest[stay]


def _patches(chart: Chart, best: Tensor, query: int, side: int, generator: torch.Generator) -> Tensor:
    """Coordinates in the place of the best: stripes at first, then a square of others."""
    if query:
        return patched(best, chart.lower, chart.upper, side, generator)
    up = signs((len(best), best.shape[1], 1, best.shape[3]), best, generator)
    return torch.where(up, chart.upper, chart.lower)


def _bumps(chart: Chart, best: Tensor, query: int, side: int, generator: torch.Generator) -> Tensor:
    """The same in L2: tiles at first."""
    begin, propose = SEARCHES["l2"]
    ones = torch.ones_like(best)
    gain = float(chart.spread(ones).norm() / ones.norm())
    middle, ball = torch.full_like(best, 0.5), L2(chart.threat.eps / gain)
    moved = propose(middle + best, middle, ball, side, generator) if query else begin(middle, ball, generator)
    return chart.project(moved - middle)


PROPOSALS = {"linf": _patches, "l2": _bumps}
