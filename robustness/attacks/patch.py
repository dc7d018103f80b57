"""Adversarial patches by gradients: where the square pays most, then steps by sign inside it.

The places are searched as in Rao et al. 2020 and attacks on certified defences do; Brown et al. 2017 is the origin.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from dfmcl.common.errors import BadInput
from dfmcl.robustness.attacks.trial import Trial
from dfmcl.robustness.losses import margin, targeted_margin, value_and_gradient
from dfmcl.robustness.threats.patch import Patch
from dfmcl.robustness.threats.threat import Threat

Model = Callable[[Tensor], Tensor]
PROBES = 24  # pairs of a place and a class that are tried before the best are climbed
MOMENTUM = 0.9
LONGEST = 0.5  # a first step: from grey to the end of the range; steps shrink to a tenth of it along a cosine
SHORTEST = 0.05


def patch(
    model: Model,
    x: Tensor,
    y: Tensor,
    threat: Threat,
    *,
    generator: torch.Generator,
    steps: int = 40,
    restarts: int = 6,
    targets: int = 9,
    trial: Trial | None = None,
) -> Tensor:
    """Per image the first point that fools the model, else the one of highest margin.

    For each of the `targets` likeliest wrong classes one gradient tells how much the square could gain at each place
    if the network were linear; the best place of each cell of half a side is a candidate. The `PROBES` best pairs of a
    place and a class are tried with the values that the gradient asks for, and the `restarts` best of those are climbed
    for `steps` steps by sign: the first half of them from there, the others from random values. An image that holds
    costs targets + PROBES + restarts * (steps + 1) forward passes; BadInput where the threat is no patch.
    """
    if not isinstance(threat, Patch):
        raise BadInput(f"patch: the threat is {threat}; take one such as patch:5x5")
    kept = _Best(x, y, trial or Trial(y))
    if not len(x):
        return kept.points
    side = threat.pixels(tuple(x.shape[1:]))
    pairs = _probed(model, kept, side, targets)
    for number in range(min(restarts, pairs.place.shape[1])):
        rows = kept.left
        if not len(rows):
            break
        begin = pairs.only(rows, number)
        noise = torch.rand(begin.point.shape, generator=generator, device=x.device, dtype=x.dtype)
        point = begin.point if number < (restarts + 1) // 2 else torch.where(begin.inside, noise, begin.point)
        _climb(model, kept, rows, point, begin.inside, begin.target, steps)
    return kept.points


class _Best:
    """What was found so far: points `(N, C, H, W)` and their margins `(N,)`, inf where one fooled."""

    def __init__(self, x: Tensor, y: Tensor, trial: Trial) -> None:
        self.x, self.y, self.points, self.trial = x, y, x.clone(), trial
        self.margins = x.new_full((len(x),), float("-inf"))

    @property
    def left(self) -> Tensor:
        """Rows of the images that hold."""
        return torch.nonzero(self.margins < torch.inf).squeeze(1)

    def look(self, rows: Tensor, points: Tensor, logits: Tensor, *, gradient: bool) -> tuple[Tensor, Tensor]:
        """Keep what is better; who goes on, and the margins, `(M,)` each."""
        fooled = self.trial.look(rows, points, logits, gradient=gradient)
        value = torch.where(fooled, torch.inf, margin(logits, self.y[rows]))
        better = value > self.margins[rows]
        self.points[rows[better]], self.margins[rows[better]] = points[better], value[better]
        return ~fooled, value


class _Pairs:
    """Candidates of each image, the best first: the square's top left corner and the class, `(N, P)` each.

    directions `(N, T, C, H, W)`: by class, whether its gradient asks for 1 or 0; which `(N, P)`: among those.
    """

    def __init__(
        self, kept: _Best, side: int, place: Tensor, which: Tensor, classes: Tensor, directions: Tensor
    ) -> None:
        self.kept, self.side, self.place, self.which = kept, side, place, which
        self.classes, self.directions = classes, directions

    def ordered(self, order: Tensor) -> _Pairs:
        """In the order `(N, P)`."""
        place, which = self.place.gather(1, order), self.which.gather(1, order)
        return _Pairs(self.kept, self.side, place, which, self.classes, self.directions)

    def only(self, rows: Tensor, number: int) -> _Begin:
        """One candidate of some images `(M,)`."""
        which, x = self.which[rows, number], self.kept.x[rows]
        inside = square(x, self.place[rows, number], self.side)
        return _Begin(
            torch.where(inside, self.directions[rows, which].to(x.dtype), x), inside, self.classes[rows, which]
        )


class _Begin:
    """Where a climb begins: points and the square's pixels `(M, C, H, W)`, and the class `(M,)` it climbs to."""

    def __init__(self, point: Tensor, inside: Tensor, target: Tensor) -> None:
        self.point, self.inside, self.target = point, inside, target


def square(x: Tensor, place: Tensor, side: int) -> Tensor:
    """The pixels of squares whose top left corners are row * W + column of `place` `(N,)`: bool `(N, C, H, W)`."""
    height, width = x.shape[2:]
    row, column = (place // width).view(-1, 1), (place % width).view(-1, 1)
    down, right = torch.arange(height, device=x.device), torch.arange(width, device=x.device)
    rows, columns = (down >= row) & (down < row + side), (right >= column) & (right < column + side)
    return (rows[:, None, :, None] & columns[:, None, None, :]).expand_as(x)


def gains(gradient: Tensor, x: Tensor, side: int) -> Tensor:
    """How much a linear loss gains by the best values of a square, by its top left corner: `(N, H', W')`."""
    free = torch.maximum(gradient * (1 - x), -gradient * x).sum(dim=1, keepdim=True)
    return functional.avg_pool2d(free, side, stride=1).squeeze(1) * side**2


def _probed(model: Model, kept: _Best, side: int, targets: int) -> _Pairs:
    """The candidates by what their first points really do."""
    x, everyone = kept.x, kept.left
    with torch.no_grad():
        logits = model(x)
    kept.trial.spend(everyone, forward=1)
    wrong = logits.scatter(1, kept.y[:, None], float("-inf"))
    classes = wrong.topk(min(targets, wrong.shape[1] - 1), dim=1).indices
    stride, width = max(1, side // 2), x.shape[3]
    expected, places, directions = [], [], []
    for target in classes.unbind(dim=1):
        value, gradient, _ = value_and_gradient(model, x, targeted_margin, (kept.y, target), True)
        kept.trial.spend(everyone, forward=1, backward=1)
        gained = gains(gradient, x, side)
        best, place = functional.max_pool2d(gained[:, None], stride, ceil_mode=True, return_indices=True)
        place = place.flatten(1)  # in the map of corners, which is narrower than the image
        across = gained.shape[2]
        places.append(place // across * width + place % across)
        expected.append(best.flatten(1) + value[:, None])
        directions.append(gradient > 0)
    which = torch.arange(classes.shape[1], device=x.device).repeat_interleave(places[0].shape[1]).expand(len(x), -1)
    pairs = _Pairs(kept, side, torch.cat(places, dim=1), which, classes, torch.stack(directions, dim=1))
    pairs = pairs.ordered(torch.cat(expected, dim=1).topk(min(PROBES, which.shape[1]), dim=1).indices)
    reached = x.new_full(pairs.place.shape, float("-inf"))
    for number in range(pairs.place.shape[1]):
        rows = kept.left
        if not len(rows):
            break
        points = pairs.only(rows, number).point
        with torch.no_grad():
            logits = model(points)
        reached[rows, number] = kept.look(rows, points, logits, gradient=False)[1]
    return pairs.ordered(reached.argsort(dim=1, descending=True, stable=True))


def _climb(model: Model, kept: _Best, rows: Tensor, point: Tensor, inside: Tensor, target: Tensor, steps: int) -> None:
    velocity = torch.zeros_like(point)
    for step in range(steps + 1):
        labels = (kept.y[rows], target)
        _, gradient, logits = value_and_gradient(model, point, targeted_margin, labels, step < steps)
        stay, _ = kept.look(rows, point, logits, gradient=step < steps)
        if step == steps or not stay.any():
            break
        rows, inside, target = rows[stay], inside[stay], target[stay]
        size = (gradient[stay] * inside).abs().flatten(1).sum(dim=1).clamp_min(1e-12)
        velocity = MOMENTUM * velocity[stay] + gradient[stay] * inside / size.view(-1, 1, 1, 1)
        share = (1 + torch.cos(torch.tensor(torch.pi * step / steps))).item() / 2
        length = SHORTEST + (LONGEST - SHORTEST) * share
        point = (point[stay] + length * velocity.sign() * inside).clamp(0, 1)
