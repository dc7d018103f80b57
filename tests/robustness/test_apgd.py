"""Auto-PGD and its losses: closed forms, linear models, and what was seen on the way."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from dfmcl.common.errors import BadInput
from dfmcl.robustness import losses
from dfmcl.robustness.attacks.apgd import apgd, apgd_targeted, checkpoints, stalled
from dfmcl.robustness.attacks.registry import Attack, climb
from dfmcl.robustness.attacks.trial import Trial
from dfmcl.robustness.threats.l2 import L2
from dfmcl.robustness.threats.linf import Linf
from dfmcl.robustness.threats.registry import BALLS, threat_of
from tests.linear import peaks, stream

SHAPE = (3, 6, 6)


def network(classes: int = 5, seed: int = 0) -> nn.Module:
    """A random network with a curved loss."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.Linear(108, 16), nn.Tanh(), nn.Linear(16, classes)).requires_grad_(False)


def greys(count: int, seed: int = 0) -> Tensor:
    return torch.rand(count, *SHAPE, generator=stream(seed))


# --- the losses ---------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(st.lists(st.floats(-20, 20, width=32), min_size=4, max_size=8, unique=True), st.data())
def test_dlr_is_the_formula_of_the_paper(values: list[float], data: st.DataObject) -> None:
    """The targeted ratio against a plain sort in Python, for every class and target."""
    y = data.draw(st.integers(0, len(values) - 1))
    target = data.draw(st.integers(0, len(values) - 1).filter(lambda t: t != y))
    logits = torch.tensor([values], dtype=torch.float64)
    ranked = sorted(values, reverse=True)
    aimed = -(values[y] - values[target]) / (ranked[0] - (ranked[2] + ranked[3]) / 2 + 1e-12)
    assert losses.targeted_dlr(logits, torch.tensor([y]), torch.tensor([target])).item() == pytest.approx(aimed)


def test_dlr_is_blind_to_shift_and_scale() -> None:
    """What makes cross-entropy vanish, large logits, leaves the ratio as it is."""
    logits, y = torch.randn(50, 6, generator=stream()).double(), torch.arange(50) % 6
    target = (y + 1) % 6
    assert torch.allclose(losses.targeted_dlr(100 * logits + 7, y, target), losses.targeted_dlr(logits, y, target))


def test_too_few_classes_are_refused() -> None:
    """The targeted loss needs four; the message names a way out."""
    logits, y = torch.randn(2, 3), torch.tensor([0, 1])
    with pytest.raises(BadInput, match=r"3 classes, at least 4.*apgd-ce"):
        losses.targeted_dlr(logits, y, 1 - y)


@pytest.mark.parametrize("classes", [2, 3])
def test_the_targeted_attack_works_with_few_classes(classes: int) -> None:
    """Below four classes it climbs the bare difference of logits, and finds what APGD-CE finds."""
    model, x = network(classes), greys(60)
    y, threat = model(x).argmax(dim=1), Linf(0.01 if classes == 3 else 0.02)
    held = {
        name: int((model(Attack.parse(name)(model, x, y, threat, generator=stream())).argmax(dim=1) == y).sum())
        for name in ("apgd-t-20", "apgd-ce-20")
    }
    assert 0 < held["apgd-t-20"] <= held["apgd-ce-20"] < 60


# --- the step size ------------------------------------------------------------------------------------------


def test_checkpoints_are_those_of_the_paper() -> None:
    """p = 0, 0.22, 0.41, 0.57, 0.70, ... of the steps; rounded up."""
    assert checkpoints(100) == [22, 41, 57, 70, 80, 87, 93, 99]
    assert checkpoints(20) == [5, 9, 12, 14, 16, 18, 19, 20]
    assert checkpoints(1) == [1]


def test_step_size_halves_by_either_condition() -> None:
    """Fewer rises than 75 % of the period, or nothing new since a checkpoint that did not halve."""
    rises = torch.tensor([14, 15, 20, 20, 20])
    highest, before = torch.tensor([2.0, 2, 1, 1, 2]), torch.tensor([1.0, 1, 1, 1, 1])
    halved = torch.tensor([False, False, False, True, False])
    assert stalled(rises, 20, highest, before, halved).tolist() == [True, False, True, False, False]


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_a_peak_inside_the_ball_is_found(norm: str) -> None:
    """The loss peaks inside the ball: a step of 2 eps jumps over it for ever, halved steps close in on it."""
    x = torch.full((1, *SHAPE), 0.5)
    peak = x + 0.1 / (1 if norm == "linf" else x[0].numel() ** 0.5) * (greys(1) * 2 - 1)
    threat, y = threat_of(norm, 0.2), torch.tensor([0])

    def hill(point: Tensor) -> Tensor:  # class 0 always wins, by least at the peak
        lead = 1 + (point - peak).square().flatten(1).sum(dim=1)
        return torch.stack([lead, torch.zeros_like(lead)], dim=1)

    found = apgd(hill, x, y, threat, generator=stream())
    fixed = climb(hill, x, y, threat, generator=stream(), steps=100, step_size=2 * threat.eps)
    assert BALLS[norm].lengths(found - peak).item() < 0.02 * threat.eps
    assert BALLS[norm].lengths(fixed - peak).item() > 0.2 * threat.eps


def test_steps_are_those_of_the_paper() -> None:
    """Algorithm 1 in float64: before the first checkpoint each point follows from the two before, momentum included."""
    model, x = network().double(), greys(4).double()
    y, threat, seen = model(x).argmax(dim=1), L2(0.05), list[Tensor]()

    def watched(point: Tensor) -> Tensor:
        seen.append(point.detach().clone())
        return model(point)

    nobody = Trial(y, lambda rows, points: torch.zeros(len(rows), dtype=torch.bool))  # leaves the batch
    apgd(watched, x, y, threat, generator=stream(), steps=30, trial=nobody)  # the first checkpoint comes after 7 steps
    for step in range(1, 6):
        *_, before, point, after = seen[: step + 2]
        _, gradient, _ = losses.value_and_gradient(model, point, losses.cross_entropy, (y,), True)
        uphill = threat.project(point + 2 * threat.eps * L2.steepest(gradient), x)
        assert torch.allclose(after, threat.project(point + 0.75 * (uphill - point) + 0.25 * (point - before), x))


# --- the attack ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_targeted_attack_finds_the_nearest_class(norm: str) -> None:
    """With linear logits the distance to each class is known; the likeliest lies far off, another one decides."""
    weight = torch.randn(7, 108, generator=stream(1))
    weight[5] = weight[6] + 0.02 * weight[5]  # class 6 leads, 5 comes next, and hardly any step changes their gap
    x = 0.5 + 0.001 * (greys(6) - 0.5)
    model = lambda point: (point - 0.5).flatten(1) @ weight.T + torch.arange(7) * 0.01  # noqa: E731  # one formula
    logits = model(x)
    y = logits.argmax(dim=1)
    dual = (weight[y][:, None] - weight).norm(p=1 if norm == "linf" else 2, dim=2)
    distance = (logits.gather(1, y[:, None]) - logits) / dual
    least, nearest = distance.scatter(1, y[:, None], torch.inf).min(dim=1)
    assert (nearest != logits.topk(2, dim=1).indices[:, 1]).all()
    for i in range(len(x)):
        for factor, fooled in ((1.02, True), (0.98, False)):
            threat = threat_of(norm, factor * least[i].item())
            x_adv = apgd_targeted(model, x[i : i + 1], y[i : i + 1], threat, generator=stream(), steps=30)
            assert threat.contains(x_adv, x[i : i + 1]).all()
            assert (model(x_adv).argmax(dim=1) != y[i]).item() is fooled


@settings(max_examples=12, deadline=None)
@given(
    st.sampled_from(["apgd-ce-9", "apgd-ce-4x2", "apgd-t-6"]),
    st.sampled_from([("linf", 0.0), ("linf", 0.03), ("l2", 0.2), ("linf", 1.0)]),
    st.integers(0, 5),
    st.integers(0, 99),
)
def test_result_is_inside_and_repeatable(name: str, ball: tuple[str, float], count: int, seed: int) -> None:
    """In the ball and in [0, 1] for any batch size; the same generator gives the same bytes."""
    model, x, threat = network(seed=seed), greys(count, seed), threat_of(*ball)
    y, before = model(x).argmax(dim=1), x.clone()
    x_adv = Attack.parse(name)(model, x, y, threat, generator=stream(seed))
    assert x_adv.shape == x.shape
    assert threat.contains(x_adv, x).all()
    assert torch.equal(x_adv, Attack.parse(name)(model, x, y, threat, generator=stream(seed)))
    assert torch.equal(x, before)


@pytest.mark.parametrize("restarts", [1, 4])
@pytest.mark.parametrize("seed", range(4))
def test_nothing_better_was_seen_than_what_is_returned(seed: int, restarts: int) -> None:
    """Among many local peaks an image that holds comes back as the best point of all steps and restarts."""
    x, y, seen = greys(1, seed), torch.tensor([0]), []

    def watched(point: Tensor) -> Tensor:
        logits = peaks(point)
        seen.append(losses.cross_entropy(logits.detach(), y).item())
        return logits

    x_adv = apgd(watched, x, y, Linf(0.1), generator=stream(seed), steps=12, restarts=restarts)
    assert len(seen) == restarts * 13
    assert losses.cross_entropy(peaks(x_adv), y).item() == max(seen)


@pytest.mark.parametrize("targeted", [False, True])
def test_a_fooled_image_leaves_the_batch(targeted: bool) -> None:
    """Batches only shrink, each image that left comes back as a fooling point, and no pass follows the last one."""
    model, x = network(), greys(64)
    y, sizes = model(x).argmax(dim=1), []

    def counted(point: Tensor) -> Tensor:
        sizes.append(len(point))
        return model(point)

    run: Callable[..., Tensor] = apgd_targeted if targeted else apgd
    x_adv = run(counted, x, y, Linf(0.02), generator=stream(), steps=10)
    held = int((model(x_adv).argmax(dim=1) == y).sum())
    assert sizes == sorted(sizes, reverse=True)
    assert 0 < held < 64
    assert sizes[-1] >= held
    sizes.clear()
    assert (model(run(counted, x, y, Linf(1.0), generator=stream())).argmax(dim=1) != y).all()
    assert 0 not in sizes
    assert len(sizes) < 20
