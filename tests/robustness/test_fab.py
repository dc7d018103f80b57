"""FAB: its projection against a linear program, its finds against the closed form, its costs against its calls."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linprog, minimize
from torch import Tensor

from dfmcl.robustness.attacks.fab import fab_targeted, onto_plane
from dfmcl.robustness.attacks.registry import Attack
from dfmcl.robustness.attacks.trial import Trial
from dfmcl.robustness.models import Classifier
from dfmcl.robustness.seeds import generator
from dfmcl.robustness.threats.registry import BALLS, threat_of

SIZE = 5


def plane(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """A point in the box, a plane's normal, and how far the point is from it."""
    stream = torch.Generator().manual_seed(seed)
    x = torch.rand(1, SIZE, generator=stream, dtype=torch.float64)
    w = torch.randn(1, SIZE, generator=stream, dtype=torch.float64)
    w[:, seed % SIZE] = 0  # a coordinate that has no say
    return x, w, torch.randn(1, generator=stream, dtype=torch.float64)


@settings(deadline=None)
@given(st.integers(0, 10_000), st.sampled_from(["linf", "l2"]))
def test_the_step_onto_a_plane_is_the_shortest(seed: int, norm: str) -> None:
    """Linf: a linear program finds none shorter; L2: nor does a solver. Out of reach: the step that undoes most."""
    x, w, excess = plane(seed)
    step = onto_plane(x, w, excess, norm)
    assert ((x + step >= -1e-12) & (x + step <= 1 + 1e-12)).all()
    weights, room = w[0].numpy(), [(-float(v), 1 - float(v)) for v in x[0]]
    most = sum(max(-np.sign(float(excess)) * v * low, -np.sign(float(excess)) * v * high)
               for v, (low, high) in zip(weights, room, strict=True))  # fmt: skip
    undone = abs(float((w * step).sum()))
    if most < abs(float(excess)):
        assert undone == pytest.approx(most)
        return
    assert float((w * step).sum() + excess) == pytest.approx(0, abs=1e-9)
    if norm == "linf":
        within = np.vstack([np.hstack([sign * np.eye(SIZE), -np.ones((SIZE, 1))]) for sign in (1, -1)])
        found = linprog(
            [0] * SIZE + [1], within, np.zeros(2 * SIZE), [[*weights, 0]], [-float(excess)], [*room, (0, None)]
        )
        assert float(step.abs().max()) == pytest.approx(found.fun, abs=1e-9)
    else:
        meet = {"type": "eq", "fun": lambda d: weights @ d + float(excess), "jac": lambda d: weights}
        best = minimize(lambda d: d @ d, np.zeros(SIZE), jac=lambda d: 2 * d, bounds=room, constraints=[meet])
        assert float(step.square().sum()) <= best.fun + 1e-6


class Halfspaces(torch.nn.Module):
    """Three classes by two linear scores: the least perturbation is known in closed form."""

    w: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("w", torch.tensor([[1.0, -2.0, 0.5, 1.0], [0.2, 0.1, -1.0, 0.4]]))
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        scores = (x.flatten(1) - 0.5) @ self.w.T
        return torch.cat([torch.zeros(len(x), 1), scores - 0.3], dim=1)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_it_finds_the_least_perturbation_of_a_linear_model(norm: str) -> None:
    """At the middle of the box nothing limits the step, so the distance is |score| / dual norm of w."""
    model, x, y = Halfspaces().eval(), torch.full((1, 1, 2, 2), 0.5), torch.zeros(1, dtype=torch.long)
    dual = model.w.abs().sum(dim=1) if norm == "linf" else model.w.norm(dim=1)
    least = float((0.3 / dual).min())
    trial = Trial(y, lambda rows, points: torch.zeros(len(rows), dtype=torch.bool))  # it must go on to the end
    wide = threat_of(norm, least * 1.01)
    found = fab_targeted(model, x, y, wide, generator=generator(0), steps=40, trial=trial)
    assert trial.unconfirmed.all()
    assert least * 0.999 <= float(BALLS[norm].lengths(found - x)) <= least * 1.01
    narrow = fab_targeted(model, x, y, threat_of(norm, least * 0.98), generator=generator(0), steps=40)
    assert model(narrow).argmax(dim=1).item() == 0, "nothing is adversarial so near"


@pytest.mark.parametrize(("norm", "eps"), [("linf", 20 / 255), ("l2", 1.0)])
@pytest.mark.parametrize("count", [0, 1, 3])
def test_results_lie_in_the_ball(
    hardened: Classifier, digits: tuple[Tensor, Tensor], norm: str, eps: float, count: int
) -> None:
    """For any number of images, and from a random start too."""
    x, y = digits[0][:count], digits[1][:count]
    threat = threat_of(norm, eps)
    found = Attack.parse("fab-t-4x2")(hardened, x, y, threat, generator=generator(0))
    assert found.shape == x.shape
    assert threat.contains(found, x).all()


def test_two_passes_forward_and_one_back_a_step(hardened: Classifier, digits: tuple[Tensor, Tensor]) -> None:
    """An image that holds costs one look and, for each class and step, two forward passes and a backward one."""
    x, y = digits[0][:8], digits[1][:8]
    trial = Trial(y, lambda rows, points: torch.zeros(len(rows), dtype=torch.bool))
    fab_targeted(hardened, x, y, threat_of("linf", "20/255"), generator=generator(0), steps=5, trial=trial)
    assert (trial.forward == 1 + 9 * 5 * 2).all()
    assert (trial.backward == 9 * 5).all()
