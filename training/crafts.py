"""Members of the pool that training draws from: attacks by name, and threats of another kind than S(t)'s ball.

A threat such as `patch:2%` grows as S(t) does: `done` is the share of full strength that is reached, in (0, 1].
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from dfmcl.robustness.attacks.patch import gains, square
from dfmcl.robustness.attacks.registry import Model
from dfmcl.robustness.losses import cross_entropy, value_and_gradient
from dfmcl.robustness.threats.ball import Ball
from dfmcl.robustness.threats.corruption import Corruption
from dfmcl.robustness.threats.patch import Patch
from dfmcl.robustness.threats.registry import parse_threat
from dfmcl.robustness.threats.spatial import Spatial
from dfmcl.robustness.threats.threat import as_levels
from dfmcl.training.adversary import CRAFTS, Craft, iterated
from dfmcl.training.noise import Noise


def of_ball(threat: Ball, model: Model, x: Tensor, y: Tensor, eps: float, noise: Noise, **chosen: float) -> Tensor:
    """PGD in a ball with a norm and a radius of its own, whatever the curriculum's are."""
    eps = chosen["done"] * threat.eps
    return iterated(model, x, y, eps, noise, ball=type(threat), **chosen)  # type: ignore[arg-type]  # steps is an int


def of_patch(
    threat: Patch,
    model: Model,
    x: Tensor,
    y: Tensor,
    eps: float,
    noise: Noise,
    *,
    steps: int,
    step_ratio: float,
    done: float,
) -> Tensor:
    """A square of random values, then `steps` steps by sign inside it; its side grows with `done`.

    Half of the squares lie where a linear network would lose most, as an attacker would put them, the others anywhere.
    """
    side = max(1, round(done * threat.pixels(tuple(x.shape[1:]))))
    _, gradient, _ = value_and_gradient(model, x, cross_entropy, (y,), True)
    gained = gains(gradient, x, side)
    size = torch.tensor(gained.shape[1:], device=x.device)
    best = gained.flatten(1).argmax(dim=1)
    chance = noise.uniform(len(x), 3).to(x.device)
    anywhere = (chance[:, :2] * size).long()
    corner = torch.where(chance[:, 2:] < 0.5, torch.stack([best // size[1], best % size[1]], dim=1), anywhere)
    inside = square(x, corner[:, 0] * x.shape[3] + corner[:, 1], side)
    point = torch.where(inside, noise.uniform(*x.shape), x)
    for _ in range(steps):
        _, gradient, _ = value_and_gradient(model, point, cross_entropy, (y,), True)
        moved = (point + step_ratio * 0.5 / steps * gradient.sign()).clamp(0, 1)
        point = torch.where(inside, moved, x)
    return point


def of_moves(
    threat: Spatial,
    model: Model,
    x: Tensor,
    y: Tensor,
    eps: float,
    noise: Noise,
    *,
    steps: int,
    done: float,
    **unused: float,
) -> Tensor:
    """The worst of `steps` random moves for each image, none farther than `done` of the way. Engstrom et al. 2019."""
    images, half = as_levels(x), torch.tensor([(count - 1) // 2 for count in threat.steps], device=x.device)
    worst, highest = x, x.new_full((len(x),), -torch.inf)
    for _ in range(steps):
        chance = 2 * noise.uniform(len(x), 3).to(x.device) - 1
        turn, row, column = (half + (chance * done * half).round().long()).unbind(dim=1)
        numbers = (turn * threat.steps[1] + row) * threat.steps[2] + column
        moved = _as_float(threat.transformed(images, numbers), x)
        with torch.no_grad():
            value = cross_entropy(model(moved), y)
        better = value > highest
        worst = torch.where(better.view(-1, 1, 1, 1), moved, worst)
        highest = torch.where(better, value, highest)
    return worst


def of_corruptions(
    threats: Sequence[Corruption],
    model: Model,
    x: Tensor,
    y: Tensor,
    eps: float,
    noise: Noise,
    *,
    done: float,
    **unused: float,
) -> Tensor:
    """For each image one of the corruptions, at `done` of its severity, rounded up: no gradient, no search."""
    images, chosen = as_levels(x), (noise.uniform(len(x)) * len(threats)).long().tolist()
    found = []
    for row, number in enumerate(chosen):
        threat = replace(threats[number], severity=math.ceil(done * threats[number].severity))
        found.append(threat.transformed(images[row : row + 1], torch.zeros(1, dtype=torch.long)))
    return _as_float(torch.cat(found), x)


def _as_float(images: Tensor, like: Tensor) -> Tensor:
    """Bytes `(N, C, H, W)` as images like others, also in their layout."""
    return torch.empty_like(like).copy_(images).div_(255)


OF_THREAT: dict[str, Craft] = {"linf": of_ball, "l2": of_ball, "patch": of_patch, "spatial": of_moves}
"""By kind of threat; corruptions are drawn from, however many there are."""


def craft_of(member: str, shape: tuple[int, ...]) -> Craft:
    """The attack of a member of the pool on images `(C, H, W)`; BadInput where its threat has no room in them."""
    if member in CRAFTS:
        return CRAFTS[member]
    threat = parse_threat(member)
    for part in threat.parts:
        part.fits(shape)
    if corruptions := [part for part in threat.parts if isinstance(part, Corruption)]:
        return partial(of_corruptions, corruptions)
    return partial(OF_THREAT[threat.kind], threat)
