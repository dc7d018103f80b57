"""Constraint relaxation: steps towards one wrong class after another that may leave the ball for a while.

A search that is held in the ball at every step ends in corners; a larger ball lets it pass around them, and a smaller
one with noise starts it anew near the place that it found. Only points inside the ball count. The attack, its step
sizes and its thresholds are those of "constraint relaxation" (AAAI 2025). Its thresholds are in raw logits; ours are in
units of each image's own logits, so that a model times 1,000 loses the same images.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from dfmcl.robustness import losses
from dfmcl.robustness.attacks.trial import Trial
from dfmcl.robustness.threats.ball import Ball

Model = Callable[[Tensor], Tensor]

BEGIN = (*(0.5,) * 5, 0.25, *(0.5,) * 4)  # of eps: the steps on the cross-entropy
CYCLES = (0.5, 0.25, 0.125, 0.0625, 0.05)  # of eps: the steps of a cycle, and by how much its ball grows and shrinks
HOPELESS = 1.0  # of a cycle's step: an image whose margin is wider after two thirds of it leaves this target
NEAR = 0.05  # a target that came so near is tried again
UNIT = 10.0  # a unit of the margin is the largest logit's height above the mean, divided by this


def constraint_relaxation(
    model: Model,
    x: Tensor,
    y: Tensor,
    threat: Ball,
    *,
    generator: torch.Generator,
    steps: int = 150,
    restarts: int = 5,
    trial: Trial | None = None,
) -> Tensor:
    """Per image the first point that fools the model, else the one of highest margin, always inside the ball.

    Ten steps on the cross-entropy choose the ln K likeliest wrong classes; then for each a run of `steps` in five
    cycles, which an image leaves where it falls or its margin stays wide; then up to restarts - 1 further runs for the
    targets that came near. About 50 forward and 35 backward passes an image, where APGD-CE and APGD-T spend 480.
    """
    search = _Search(model, x, y, threat, generator, trial or Trial(y))
    targets = search.begin()
    near = torch.zeros(targets.shape, dtype=torch.bool, device=x.device)
    for number in range(restarts):
        for place, target in enumerate(targets.unbind(dim=1)):
            wanted = search.left if number == 0 else search.left & near[:, place]
            rows = torch.nonzero(wanted).squeeze(1)
            if len(rows):
                closest = search.towards(rows, target[rows], max(steps // len(CYCLES), 3))
                near[rows, place] |= closest < NEAR
    return search.best


@dataclass
class _Search:
    """An attack on N images, with its finds so far.

    best: the points `(N, C, H, W)` to be returned; highest: their margins `(N,)`, inf where one fools the model.
    unit: of each image's logits `(N,)`, from the first that were seen; NaN before.
    """

    model: Model
    x: Tensor
    y: Tensor
    threat: Ball
    generator: torch.Generator
    trial: Trial
    best: Tensor = field(init=False)
    highest: Tensor = field(init=False)
    unit: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.best = self.x.clone()
        self.highest = self.x.new_full((len(self.x),), -torch.inf)
        self.unit = self.x.new_full((len(self.x),), torch.nan)

    @property
    def left(self) -> Tensor:
        """Which images hold so far, `(N,)` bool."""
        return self.highest < torch.inf

    def ball(self, share: float) -> Ball:
        """The ball of so much of the radius."""
        return self.threat.sized(share * self.threat.eps)

    def begin(self) -> Tensor:
        """Climb the cross-entropy: the likeliest wrong classes of each image `(N, T)`."""
        rows, point = torch.arange(len(self.x), device=self.x.device), self.threat.start(self.x, self.generator)
        last = torch.empty(0)  # each image's logits where it fell or ended
        for size in (*BEGIN, 0.0):
            labels = self.y[rows], rows
            _, gradient, logits = losses.value_and_gradient(self.model, point, self.surprise, labels, size > 0)
            last = last.index_copy(0, rows, logits) if len(last) else logits
            stay = ~self.look(rows, point, logits, gradient=size > 0)
            rows, gradient, point = rows[stay], gradient[stay], point[stay]
            if not len(rows):
                break
            point = self.step(point, rows, gradient, size, self.threat)
        classes = last.shape[1]
        wrong = last.scatter(1, self.y[:, None], -torch.inf)
        return wrong.topk(min(math.ceil(math.log(classes)), classes - 1), dim=1).indices

    def surprise(self, logits: Tensor, y: Tensor, rows: Tensor) -> Tensor:
        """The cross-entropy of logits in their units: neither saturated nor flat, on whatever scale the model is."""
        spread = logits.detach().amax(dim=1) - logits.detach().mean(dim=1)
        known = self.unit[rows]
        self.unit[rows] = torch.where(known.isnan(), (spread / UNIT).clamp_min(losses.TINY), known)
        return losses.cross_entropy(logits / self.unit[rows, None], y)

    def towards(self, rows: Tensor, target: Tensor, length: int) -> Tensor:
        """One run on images `rows` `(M,)`: how near, in units, each came to its target, `(M,)`; beyond it below 0."""
        closest, own = self.unit.new_full((len(rows),), torch.inf), torch.arange(len(rows), device=rows.device)
        point = self.threat.start(self.x[rows], self.generator)
        for size in CYCLES:
            for step in range(length):
                if step == length // 3:
                    point = self.threat.project(point, self.x[rows])
                if step == 2 * length // 3:
                    point = self.ball(1 - size).project(point, self.x[rows])
                    point = self.threat.project(self.ball(size).start(point, self.generator), self.x[rows])
                value, gradient, logits = losses.value_and_gradient(
                    self.model, point, losses.targeted_margin, (self.y[rows], target[own]), True
                )
                gap = -value / self.unit[rows]
                if outside := 0 < step < length // 3:
                    fooled = self.look_within(rows, point, logits)
                else:
                    fooled = self.look(rows, point, logits, gradient=True)
                    closest[own] = torch.minimum(closest[own], gap)
                stay = ~fooled
                if step == 2 * length // 3 - 1:
                    stay &= gap <= HOPELESS * size
                if not stay.any():
                    return closest
                rows, own, gradient, point = rows[stay], own[stay], gradient[stay], point[stay]
                ball = self.ball(1 + size) if outside or step == 0 else self.threat
                point = self.step(point, rows, gradient, size, ball)
        _, _, logits = losses.value_and_gradient(self.model, point, losses.margin, (self.y[rows],), False)
        self.look(rows, point, logits, gradient=False)
        return closest

    def step(self, point: Tensor, rows: Tensor, gradient: Tensor, size: float, ball: Ball) -> Tensor:
        """Uphill by so much of eps, and back into a ball around the images."""
        ahead = point + size * self.threat.eps * self.threat.steepest(gradient)
        return ball.project(ahead, self.x[rows])

    def look(self, rows: Tensor, points: Tensor, logits: Tensor, *, gradient: bool) -> Tensor:
        """Which of the images `rows` `(M,)` fall at these points, which lie in the ball, `(M,)` bool."""
        fooled = self.trial.look(rows, points, logits, gradient=gradient)
        value = torch.where(fooled, torch.inf, losses.margin(logits, self.y[rows]))
        better = value > self.highest[rows]
        self.best[rows[better]], self.highest[rows[better]] = points[better], value[better]
        return fooled

    def look_within(self, rows: Tensor, points: Tensor, logits: Tensor) -> Tensor:
        """The same at points that may lie outside: where the model errs, their projections are looked at."""
        self.trial.spend(rows, forward=1, backward=1)
        fooled = torch.zeros(len(rows), dtype=torch.bool, device=rows.device)
        errs = torch.nonzero(~losses.right(logits, self.y[rows])).squeeze(1)
        if len(errs):
            inside = self.threat.project(points[errs], self.x[rows[errs]])
            with torch.no_grad():
                again = self.model(inside)
            fooled[errs] = self.look(rows[errs], inside, again, gradient=False)
        return fooled
