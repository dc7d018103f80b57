"""L1: its projection against a general solver, its attack against closed forms and foolbox's."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import foolbox
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize
from torch import Tensor

from dfmcl.robustness.attacks.registry import Attack
from dfmcl.robustness.attacks.trial import Trial
from dfmcl.robustness.models import Classifier
from dfmcl.robustness.statistics import Flags, PairedCounts
from dfmcl.robustness.threats.l1 import L1, sparse_steepest
from tests.linear import Linear, images, stream
from tests.robustness.test_apgd import network
from tests.robustness.test_strength import LEVEL, attack, of_foolbox, ours, theirs

SHAPE = (3, 6, 6)


@given(st.integers(0, 2**31), st.floats(0.05, 3), st.integers(1, 6))
@settings(max_examples=15)
def test_projection_is_the_nearest_point_of_ball_and_box(seed: int, eps: float, values: int) -> None:
    """No point that a general solver finds is nearer: SLSQP on change up and down apart, where L1 is linear."""
    draw = np.random.default_rng(seed)
    x, wild = draw.random(values), draw.normal(0.5, 1.0, values)
    found = L1(eps).project(*(torch.tensor(one).view(1, 1, 1, -1) for one in (wild, x))).numpy().ravel()
    assert np.abs(found - x).sum() <= eps + 1e-9
    assert found.min() >= 0
    assert found.max() <= 1
    solved = minimize(
        lambda d: ((x + d[:values] - d[values:] - wild) ** 2).sum(),
        np.zeros(2 * values),
        bounds=[*zip(np.zeros(values), 1 - x, strict=True), *zip(np.zeros(values), x, strict=True)],
        constraints={"type": "ineq", "fun": lambda d: eps - d.sum()},
        method="SLSQP",
        options={"ftol": 1e-12, "maxiter": 200},
    )
    assert ((found - wild) ** 2).sum() <= solved.fun + 1e-6
    assert np.abs(found - (x + solved.x[:values] - solved.x[values:])).max() < 1e-3


def test_projection_of_many_values_meets_its_equation() -> None:
    """On 5,000 values: outside the ball the length is eps exactly, and all values that moved freely shrank alike."""
    x = torch.rand(4, 1, 50, 100, generator=stream()).double()
    wild = x + torch.randn(x.shape, generator=stream(1)).double() * torch.tensor([0.0, 1e-4, 0.1, 3.0]).view(
        -1, 1, 1, 1
    )
    found = L1(30.0).project(wild, x)
    assert torch.equal(found[:2], wild[:2].clamp(0, 1))
    assert torch.allclose(L1.lengths(found - x)[2:], torch.tensor(30.0).double(), atol=1e-9)
    for one, origin, asked in zip(found[2:], x[2:], wild[2:], strict=True):
        free = (one != origin) & (one > 0) & (one < 1)
        shrunk = ((asked - origin).abs() - (one - origin).abs())[free]
        assert shrunk.max() - shrunk.min() < 1e-9


@given(st.integers(0, 2**31), st.integers(0, 400))
@settings(max_examples=25)
def test_bytes_use_the_ball(seed: int, levels: int) -> None:
    """Rounded images are inside, and one level more of change is outside: membership counts whole levels."""
    images = torch.randint(0, 256, (2, 3, 4, 4), generator=stream(seed)).to(torch.uint8)
    threat, x = L1(levels / 255), images.float() / 255
    moved = threat.to_uint8(threat.start(x, stream(seed + 1)), x)
    assert threat.contains_uint8(moved, images).all()
    assert threat.on_grid() == threat
    exact = images.clone().flatten(1).long()
    exact[:, 0] = (exact[:, 0] + 128) % 256
    more = (exact.view_as(images) - images.long()).abs().flatten(1).sum(dim=1)
    assert (threat.contains_uint8(exact.view_as(images).to(torch.uint8), images) == (more <= levels)).all()


def test_a_sparse_step_goes_along_the_largest_slopes() -> None:
    """Of each image's own number of values, of length 1."""
    gradient = torch.tensor([[[[3.0, -2, 1, 0.5]]], [[[0.1, 0.2, -0.3, 0.4]]]])
    step = sparse_steepest(gradient, torch.tensor([1.0, 2.9]))
    assert step.flatten(1).tolist() == [[1, 0, 0, 0], [0, 0, -0.5, 0.5]]
    assert torch.equal(L1.steepest(gradient)[:, 0, 0], torch.tensor([[1.0, 0, 0, 0], [0, 0, 0, 1.0]]))


def least(model: Linear, x: Tensor) -> Tensor:
    """The smallest L1 radius that crosses, `(N,)`: the steepest values go to the end of the box, one after another."""
    slopes, order = model.weight.detach().flatten().abs().sort(descending=True)
    down = (model.weight.detach().flatten() > 0)[order]
    room = torch.where(down, x.flatten(1)[:, order], 1 - x.flatten(1)[:, order])
    gained, spent = (room * slopes).cumsum(dim=1), room.cumsum(dim=1)
    score = model.score(x).detach()[:, None]
    place = (gained < score).sum(dim=1, keepdim=True)
    rest = gained.gather(1, place) - score
    return (spent.gather(1, place) - rest / slopes[place]).squeeze(1)


@pytest.mark.parametrize("name", ["apgd-ce-60", "apgd-t-60"])
@pytest.mark.parametrize("count", [0, 1, 5])
def test_apgd_crosses_just_beyond_the_optimum_and_never_before(name: str, count: int) -> None:
    """The box binds: the best point moves several values all the way. 3 % beyond it an image falls, 1 % short none."""
    model, x = Linear(SHAPE).requires_grad_(False), images(count, SHAPE)
    y = model(x).argmax(dim=1)
    for i, radius in enumerate(least(model, x).tolist()):
        for factor, fooled in ((1.03, True), (0.99, False)):
            threat = L1(factor * radius)
            x_adv = Attack.parse(name)(model, x[i : i + 1], y[i : i + 1], threat, generator=stream())
            assert threat.contains(x_adv, x[i : i + 1]).all()
            assert (model(x_adv).argmax(dim=1) != y[i]).item() is fooled
    assert Attack.parse(name)(model, x, y, L1(0.1), generator=stream()).shape == x.shape


def test_passes_are_counted_and_the_same_seed_gives_the_same_point() -> None:
    """An image that holds costs steps + 1 forward and steps backward passes."""
    model, x = network(), images(6, SHAPE)
    y = model(x).argmax(dim=1)
    trials = [Trial(y), Trial(y)]
    one, two = (Attack.parse("apgd-ce-7")(model, x, y, L1(0.01), generator=stream(), trial=trial) for trial in trials)
    assert torch.equal(one, two)
    assert trials[0].forward.tolist() == [8] * 6
    assert trials[0].backward.tolist() == [7] * 6


def test_apgd_is_as_strong_as_its_peer(hardened: Classifier, digits: tuple[Tensor, Tensor], record_property: Callable[[str, object], None]) -> None:  # fmt: skip  # noqa: E501
    """Beside foolbox's sparse L1 descent (SLIDE) at one budget, image by image; a tenth of the steps is weaker."""
    x, y = (part[:100] for part in digits)
    threat = L1(12.0)
    peer = of_foolbox({"l1": lambda eps: foolbox.attacks.SparseL1DescentAttack(steps=10, quantile=0.95)})
    right = (hardened(x).argmax(dim=1) == y).numpy()
    made: Callable[[], Flags] = partial(theirs, hardened, peer, x, y, threat)
    held = made() & right
    assert 0.05 < held.mean() < 0.9, held.mean()
    for steps, strong in ((10, True), (1, False)):
        mine = ours(hardened, attack("apgd-ce", steps=steps), x, y, threat)
        record_property("p above" if strong else "p below", p := PairedCounts.of(mine, held).p_more_lost)
        assert (p > LEVEL) == strong, PairedCounts.of(mine, held)
