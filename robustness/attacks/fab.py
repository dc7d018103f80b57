"""FAB: the nearest adversarial image, by steps onto the linearised boundary. Croce & Hein 2020 (ICML), algorithm 1."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from dfmcl.robustness.attacks.trial import Trial
from dfmcl.robustness.losses import targeted_margin, value_and_gradient
from dfmcl.robustness.threats.ball import Ball
from dfmcl.robustness.threats.registry import by_norm

Model = Callable[[Tensor], Tensor]

MOST_BIAS = 0.1  # alpha_max of the paper: how far a step may lean towards the boundary as seen from the image itself
OVERSHOOT = 1.05  # eta: beyond the boundary, as the network is not linear
BACK = 0.9  # beta: the way back towards the image once a step has crossed


def fab_targeted(
    model: Model,
    x: Tensor,
    y: Tensor,
    threat: Ball,
    *,
    generator: torch.Generator,
    steps: int = 100,
    restarts: int = 1,
    targets: int = 9,
    trial: Trial | None = None,
) -> Tensor:
    """FAB-T of AutoAttack: one search for each of the `targets` wrong classes likeliest at x, all K - 1 where fewer.

    Per image the first adversarial point inside the ball; else the nearest one outside, pulled back onto the ball; else
    x. An image that fell leaves the batch. The first search of a class begins at x, further ones at random
    within half the radius; a step costs two forward passes and one backward pass. It looks at differences of logits
    only, never at a loss.
    """
    trial = trial or Trial(y)
    with torch.no_grad():
        wrong = model(x).scatter(1, y[:, None], float("-inf"))
    trial.spend(torch.arange(len(x), device=x.device), forward=1)
    likeliest = wrong.topk(min(targets, wrong.shape[1] - 1), dim=1).indices
    nearest, least = x.clone(), x.new_full((len(x),), float("inf"))
    left, around = torch.arange(len(x), device=x.device), threat.sized(threat.eps / 2)
    for restart in range(restarts):
        for target in likeliest.unbind(dim=1):
            if not len(left):
                break
            begin = x[left] if restart == 0 else around.start(x[left], generator)
            search = _Search(model, x[left], y[left], target[left], threat, trial, left)
            point, length = search.run(begin, steps)
            better = length < least[left]
            nearest[left[better]], least[left[better]] = point[better], length[better]
            left = left[~search.done]
    return threat.project(nearest, x)


# How fast each coordinate moves towards the plane, by the sizes of the gradient.
SPEEDS: dict[str, Callable[[Tensor], Tensor]] = {"linf": torch.ones_like, "l2": lambda size: size}


def onto_plane(x: Tensor, w: Tensor, excess: Tensor, norm: str) -> Tensor:
    """The least step d `(M, D)` that stays in [0, 1] and undoes `excess` `(M,)`: w . d = -excess; exact.

    x, w `(M, D)`. Where the box does not allow it, the step that undoes most. Each coordinate moves against the excess,
    up to its room: all equally far (Linf) or in proportion to |w| (L2). What they undo together grows piecewise
    linearly in the common factor; its corners, sorted, give the factor. Appendix A of the paper.
    """
    direction = -torch.sign(w) * torch.sign(excess)[:, None]
    room = torch.where(direction > 0, 1 - x, x) * (direction != 0)
    size = w.abs()
    speed = by_norm(SPEEDS, norm, "fab-t")(size)
    corner = torch.where(size > 0, room / speed.clamp_min(1e-12), torch.inf)
    corner, order = corner.sort(dim=1)
    full, slope = (size * room).gather(1, order), (size * speed).gather(1, order)
    before = full.cumsum(dim=1) - full  # undone by coordinates that have used up their room
    rest = slope.flip(1).cumsum(dim=1).flip(1)  # slope of the pixels that have not
    undone = before + torch.where(rest > 0, corner * rest, 0)  # at each corner
    wanted = excess.abs()[:, None]
    first = (undone < wanted).sum(dim=1, keepdim=True).clamp(max=x.shape[1] - 1)
    factor = (wanted - before.gather(1, first)) / rest.gather(1, first).clamp_min(1e-12)
    return direction * torch.minimum(factor * speed, room)


class _Search:
    """One search of the way to class `target` `(M,)`, for images that are `rows` of the trial."""

    def __init__(
        self, model: Model, x: Tensor, y: Tensor, target: Tensor, threat: Ball, trial: Trial, rows: Tensor
    ) -> None:
        self.model, self.x, self.y, self.target = model, x, y, target
        self.threat, self.trial, self.rows = threat, trial, rows
        self.done = torch.zeros_like(y, dtype=torch.bool)
        self.nearest, self.least = x.clone(), x.new_full((len(x),), float("inf"))

    def run(self, begin: Tensor, steps: int) -> tuple[Tensor, Tensor]:
        """The nearest adversarial points `(M, C, H, W)`, and how far they are, inf where none was found."""
        point = begin.clone()
        for _ in range(steps):
            index = torch.nonzero(~self.done).squeeze(1)
            if not len(index):
                break
            labels = (self.y[index], self.target[index])
            gap, gradient, logits = value_and_gradient(self.model, point[index], targeted_margin, labels, True)
            self._look(index, point[index], logits, gradient=True)
            point[index] = self._stepped(index, point[index], gap, gradient)
            index = index[~self.done[index]]
            if not len(index):
                break
            with torch.no_grad():
                logits = self.model(point[index])
            crossed = self._look(index, point[index], logits, gradient=False)
            back = index[crossed]
            point[back] = self.x[back] + BACK * (point[back] - self.x[back])
        return self.nearest, self.least

    def _stepped(self, index: Tensor, point: Tensor, gap: Tensor, gradient: Tensor) -> Tensor:
        """Onto the plane where the two linearised logits are equal, from the point and a little from the image."""
        image, flat = self.x[index].flatten(1), point.flatten(1)
        w, norm, lengths = gradient.flatten(1), self.threat.norm, self.threat.lengths
        gap_at_image = gap + (w * (image - flat)).sum(dim=1)
        own, biased = onto_plane(flat, w, gap, norm), onto_plane(image, w, gap_at_image, norm)
        near, far = lengths(own).clamp_min(1e-8), lengths(biased).clamp_min(1e-8)
        bias = (near / (near + far)).clamp(max=MOST_BIAS)[:, None]
        moved = (1 - bias) * (flat + OVERSHOOT * own) + bias * (image + OVERSHOOT * biased)
        return moved.clamp(0, 1).view_as(point)

    def _look(self, index: Tensor, point: Tensor, logits: Tensor, *, gradient: bool) -> Tensor:
        """Which points are adversarial `(m,)`; those inside the ball are shown to the trial, the nearest are kept."""
        crossed = logits.argmax(dim=1) != self.y[index]
        length = self.threat.lengths(point - self.x[index])
        better = crossed & (length < self.least[index])
        self.nearest[index[better]], self.least[index[better]] = point[better], length[better]
        inside = length <= self.threat.eps
        self.trial.spend(self.rows[index[~inside]], forward=1, backward=int(gradient))
        fell = self.trial.look(self.rows[index[inside]], point[inside], logits[inside], gradient=gradient)
        chosen = index[inside][fell]
        self.done[chosen] = True
        self.nearest[chosen], self.least[chosen] = point[inside][fell], 0.0
        return crossed
