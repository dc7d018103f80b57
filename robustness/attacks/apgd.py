"""Auto-PGD: projected gradient ascent that finds its own step size. Croce & Hein 2020 (ICML), section 3."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from dfmcl.robustness import losses
from dfmcl.robustness.attacks.apgd_l1 import run_l1
from dfmcl.robustness.attacks.trial import Trial
from dfmcl.robustness.threats.ball import Ball
from dfmcl.robustness.threats.registry import by_norm

Model = Callable[[Tensor], Tensor]
TargetedLoss = Callable[[Tensor, Tensor, Tensor], Tensor]

FRESH = 0.75  # alpha of the paper: the share of the new step, the rest is momentum
RISING = 0.75  # rho of the paper: the share of steps that must raise the loss for the step size to stay


def apgd(
    model: Model,
    x: Tensor,
    y: Tensor,
    threat: Ball,
    *,
    generator: torch.Generator,
    loss: Callable[[Tensor, Tensor], Tensor] = losses.cross_entropy,
    steps: int = 100,
    restarts: int = 1,
    trial: Trial | None = None,
) -> Tensor:
    """Per image the first point that fools the model, else the one of highest loss over all restarts.

    An image that is fooled leaves the batch at once, which AutoAttack's own loop does only between runs. A run costs
    steps + 1 forward and steps backward passes for an image that holds.
    """

    def untargeted(logits: Tensor, y: Tensor, target: Tensor) -> Tensor:
        return loss(logits, y)

    return _strongest(model, x, y, threat, generator, untargeted, steps, [y] * restarts, trial or Trial(y))


def apgd_targeted(
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
    """APGD-T of AutoAttack: one run of the targeted DLR for each of the `targets` wrong classes likeliest at x.

    All K - 1 wrong classes where there are fewer. The DLR is not defined for K < 4, where AutoAttack has no targeted
    attack: there the bare difference of the two logits is climbed.
    """
    trial = trial or Trial(y)
    with torch.no_grad():
        wrong = model(x).scatter(1, y[:, None], float("-inf"))
    trial.spend(torch.arange(len(x), device=x.device), forward=1)
    likeliest = wrong.topk(min(targets, wrong.shape[1] - 1), dim=1).indices
    runs = [target for _ in range(restarts) for target in likeliest.unbind(dim=1)]
    loss = losses.targeted_dlr if wrong.shape[1] >= 4 else losses.targeted_margin
    return _strongest(model, x, y, threat, generator, loss, steps, runs, trial)


def checkpoints(steps: int) -> list[int]:
    """The steps after which the step size is looked at: 22 % of all, then in periods 3 % shorter each, 6 % at least.

    In whole hundredths, as 0.57 * 100 in floating point would round up to 58.
    """
    share, period, found = 0, 22, []
    while share + period <= 100:
        share, period = share + period, max(period - 3, 6)
        found.append(-(-share * steps // 100))
    return sorted(set(found))  # below 17 steps some coincide


def stalled(rises: Tensor, period: int, highest: Tensor, before: Tensor, halved: Tensor) -> Tensor:
    """Which images need a smaller step, `(N,)` bool: conditions 1 and 2 of the paper.

    Too few of the period's steps raised the loss (`rises` of `period`); or neither the step size (`halved`) nor the
    highest loss (`before`) has changed since the previous checkpoint.
    """
    return (rises < RISING * period) | (~halved & (highest == before))


@dataclass
class _Standing:
    """The images not yet fooled, one row each in every tensor."""

    index: Tensor
    x: Tensor
    y: Tensor
    target: Tensor
    point: Tensor
    previous: Tensor
    gradient: Tensor
    value: Tensor
    best: Tensor
    best_gradient: Tensor
    highest: Tensor
    before: Tensor
    step_size: Tensor
    halved: Tensor
    rises: Tensor

    def keep(self, rows: Tensor) -> None:
        for field in fields(self):
            setattr(self, field.name, getattr(self, field.name)[rows])


def _strongest(
    model: Model,
    x: Tensor,
    y: Tensor,
    threat: Ball,
    generator: torch.Generator,
    loss: TargetedLoss,
    steps: int,
    targets: Sequence[Tensor],
    trial: Trial,
) -> Tensor:
    """The best of one run for each of `targets`; a run sees only what earlier ones left."""
    best, highest = x.clone(), x.new_full((len(x),), float("-inf"))
    for target in targets:
        left = torch.nonzero(highest < torch.inf).squeeze(1)
        if not len(left):
            break
        run = by_norm(RUNS, threat.norm, "apgd")
        found, value = run(model, x[left], y[left], target[left], threat, generator, loss, steps, trial, left)
        better = value > highest[left]
        best[left[better]], highest[left[better]] = found[better], value[better]
    return best


def _run(
    model: Model,
    x: Tensor,
    y: Tensor,
    target: Tensor,
    threat: Ball,
    generator: torch.Generator,
    loss: TargetedLoss,
    steps: int,
    trial: Trial,
    rows: Tensor,
) -> tuple[Tensor, Tensor]:
    """Algorithm 1 of the paper: the best points `(N, C, H, W)` and their losses `(N,)`, inf where fooled.

    rows `(N,)`: which images of the trial these are.
    """
    lowest = x.new_full((len(x),), float("-inf"))
    best, highest = x.clone(), lowest.clone()
    begin, none = threat.start(x, generator), torch.zeros_like(x)
    s = _Standing(
        index=torch.arange(len(x), device=x.device),
        x=x,
        y=y,
        target=target,
        point=begin,
        previous=begin,
        gradient=none,
        value=lowest,
        best=begin,
        best_gradient=none,
        highest=lowest,
        before=lowest,
        step_size=x.new_full((len(x),), 2 * threat.eps),
        halved=torch.zeros_like(y, dtype=torch.bool),
        rises=torch.zeros_like(y),
    )
    checks, checked = checkpoints(steps), 0
    for step in range(steps + 1):
        value, s.gradient, logits = losses.value_and_gradient(model, s.point, loss, (s.y, s.target), step < steps)
        fooled = trial.look(rows[s.index], s.point, logits, gradient=step < steps)
        if step:
            s.rises = s.rises + (value > s.value)
        s.value = value
        better = value > s.highest
        s.best, s.best_gradient = _where(better, s.point, s.best), _where(better, s.gradient, s.best_gradient)
        s.highest = torch.where(better, value, s.highest)
        best[s.index[fooled]], highest[s.index[fooled]] = s.point[fooled], torch.inf
        if fooled.any():
            s.keep(~fooled)
        if step == steps or not len(s.index):
            break
        if step in checks:
            s.halved = stalled(s.rises, step - checked, s.highest, s.before, s.halved)
            s.step_size = torch.where(s.halved, s.step_size / 2, s.step_size)
            s.point, s.previous = _where(s.halved, s.best, s.point), _where(s.halved, s.best, s.previous)
            s.gradient = _where(s.halved, s.best_gradient, s.gradient)
            s.value = torch.where(s.halved, s.highest, s.value)
            s.before, s.rises, checked = s.highest, torch.zeros_like(s.rises), step
        length = s.step_size.view(-1, *[1] * (x.dim() - 1))
        ahead = threat.project(s.point + length * threat.steepest(s.gradient), s.x)
        if step:  # the first step has nothing behind it
            ahead = threat.project(s.point + FRESH * (ahead - s.point) + (1 - FRESH) * (s.point - s.previous), s.x)
        s.previous, s.point = s.point, ahead
    best[s.index], highest[s.index] = s.best, s.highest
    return best, highest


RUNS = {"linf": _run, "l2": _run, "l1": run_l1}


def _where(rows: Tensor, yes: Tensor, no: Tensor) -> Tensor:
    """Image by image: `yes` where rows `(N,)` is true, else `no`."""
    return torch.where(rows.view(-1, *[1] * (yes.dim() - 1)), yes, no)
