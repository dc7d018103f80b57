"""Constraint relaxation: it leaves the ball on the way, and no point outside ever counts."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from dfmcl.robustness import losses
from dfmcl.robustness.attacks.registry import Attack
from dfmcl.robustness.attacks.relaxation import constraint_relaxation
from dfmcl.robustness.attacks.trial import Trial
from dfmcl.robustness.models import Classifier
from dfmcl.robustness.threats.linf import Linf
from dfmcl.robustness.threats.registry import BALLS, threat_of
from tests.linear import Linear, images, peaks, stream

SHAPE = (3, 6, 6)


def network(classes: int = 5, seed: int = 0) -> nn.Module:
    """A random network with a curved loss, in float64: a sign that hangs on rounding is none of its truth."""
    torch.manual_seed(seed)
    layers = nn.Flatten(), nn.Linear(108, 16), nn.Tanh(), nn.Linear(16, classes)
    return nn.Sequential(*layers).double().requires_grad_(False)


def greys(count: int, seed: int = 0) -> Tensor:
    return torch.rand(count, *SHAPE, generator=stream(seed), dtype=torch.float64)


@settings(max_examples=12, deadline=None)
@given(
    st.sampled_from(["cr", "cr-15x2", "cr-1x1"]),
    st.sampled_from([("linf", 0.0), ("linf", 0.03), ("l2", 0.2), ("linf", 1.0)]),
    st.integers(0, 5),
    st.integers(2, 8),
    st.integers(0, 99),
)
def test_result_is_inside_and_repeatable(
    name: str, ball: tuple[str, float], count: int, classes: int, seed: int
) -> None:
    """In the ball and in [0, 1] for any batch size and number of classes; the same generator gives the same bytes."""
    model, x, threat = network(classes, seed), greys(count, seed), threat_of(*ball)
    y, before = model(x).argmax(dim=1), x.clone()
    x_adv = Attack.parse(name)(model, x, y, threat, generator=stream(seed))
    assert x_adv.shape == x.shape
    assert threat.contains(x_adv, x).all()
    assert torch.equal(x_adv, Attack.parse(name)(model, x, y, threat, generator=stream(seed)))
    assert torch.equal(x, before)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_a_linear_model_falls_just_beyond_its_distance(norm: str) -> None:
    """The least perturbation is known: 2 % more radius is enough, and 2 % less is not."""
    model, x = Linear(SHAPE).double(), images(20, SHAPE).double()
    least, y = model.least(x, norm), torch.ones(20, dtype=torch.int64)
    for factor, fooled in ((1.02, True), (0.98, False)):
        for i in range(len(x)):
            threat = threat_of(norm, factor * least[i].item())
            x_adv = constraint_relaxation(model, x[i : i + 1], y[i : i + 1], threat, generator=stream())
            assert (model(x_adv).argmax(dim=1) == 0).item() is fooled


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_the_way_leads_outside_and_nothing_there_counts(norm: str) -> None:
    """A model that is wrong only beyond the ball loses no image, although the attack saw it err there."""
    x, threat, seen = greys(4), threat_of(norm, 0.05), list[Tensor]()
    y = torch.zeros(4, dtype=torch.int64)

    def wall(points: Tensor) -> Tensor:
        """The margin rises with the way from the image, and changes its sign at the border of the ball."""
        origin = x[(points[:, None] - x).flatten(2).norm(dim=2).argmin(dim=1)]
        way = BALLS[norm].lengths(points - origin) / threat.eps
        seen.append(way.detach())
        return torch.stack([torch.full_like(way, 1.001), way, way - 1], dim=1)

    trial = Trial(y)
    x_adv = constraint_relaxation(wall, x, y, threat, generator=stream(), trial=trial)
    assert torch.cat(seen).max() > 1.2
    assert not trial.fooled.any()
    assert threat.contains(x_adv, x).all()
    assert (BALLS[norm].lengths(x_adv - x) > 0.99 * threat.eps).all()


@pytest.mark.parametrize("factor", [1e-3, 1e3])
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_a_model_on_another_scale_loses_the_same_images(
    hardened: Classifier, digits: tuple[Tensor, Tensor], norm: str, factor: float
) -> None:
    """The loss and the thresholds are in units of each image's logits: in float64 also the passes are the same."""
    x, y = (part[:40] for part in digits)
    threat, model = threat_of(norm, 20 / 255 if norm == "linf" else 1.2), hardened.double()

    def run(scale: float) -> Trial:
        trial = Trial(y)
        constraint_relaxation(
            lambda points: scale * model(points), x.double(), y, threat, generator=stream(), trial=trial
        )
        return trial

    try:
        plain, scaled = run(1.0), run(factor)
    finally:
        hardened.float()
    assert 4 < plain.fooled.sum() < 36
    assert torch.equal(plain.fooled, scaled.fooled)
    assert torch.equal(plain.forward, scaled.forward)


def test_nothing_better_was_seen_inside_than_what_is_returned() -> None:
    """An image that holds comes back as the point of highest margin among all that lay in the ball."""
    x, y, threat, seen = greys(1), torch.tensor([0]), Linf(0.1), list[float]()

    def watched(point: Tensor) -> Tensor:
        logits = peaks(point)
        seen.extend(losses.margin(logits.detach(), y)[threat.contains(point.detach(), x)].tolist())
        return logits

    x_adv = constraint_relaxation(watched, x, y, threat, generator=stream())
    assert losses.margin(peaks(x_adv), y).item() == max(seen)
