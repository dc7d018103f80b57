"""Threats, projections and the uint8 grid."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dfmcl.common.errors import BadInput
from dfmcl.robustness.threats.geometry import contains, contains_uint8, norms, project, start, steepest, to_uint8
from dfmcl.robustness.threats.threat import Threat, parse_eps

threats = st.one_of(
    st.floats(0, 1).map(lambda eps: Threat("linf", eps)),
    st.floats(0, 5).map(lambda eps: Threat("l2", eps)),
)
seeds = st.integers(0, 2**31)


def random_images(seed: int, count: int = 3, spread: float = 1.0) -> torch.Tensor:
    stream = torch.Generator().manual_seed(seed)
    return (0.5 + spread * (torch.rand(count, 3, 4, 4, generator=stream) - 0.5)).float()


@given(threats, seeds, seeds)
def test_projection_lands_inside(threat: Threat, seed: int, other: int) -> None:
    """Whatever comes in, the projection lies in the ball and in [0, 1]."""
    x, wild = random_images(seed), random_images(other, spread=4.0)
    assert contains(project(wild, x, threat), x, threat).all()


@given(threats, seeds, seeds)
def test_projection_is_idempotent(threat: Threat, seed: int, other: int) -> None:
    """Projecting twice changes nothing beyond float rounding."""
    x, wild = random_images(seed), random_images(other, spread=4.0)
    once = project(wild, x, threat)
    assert torch.allclose(project(once, x, threat), once, atol=1e-6)


@given(threats, seeds, st.floats(0, 0.99))
def test_projection_leaves_interior_points_alone(threat: Threat, seed: int, share: float) -> None:
    """A point well inside the ball and the box stays where it is."""
    x = random_images(seed, spread=0.5)
    stream = torch.Generator().manual_seed(seed + 1)
    direction = steepest(torch.randn(x.shape, generator=stream), threat.norm)
    inside = x + direction * share * min(threat.eps, 0.2)
    assert torch.allclose(project(inside, x, threat), inside, atol=1e-6)


@given(threats, seeds)
def test_random_start_lies_inside(threat: Threat, seed: int) -> None:
    """A random start obeys the threat."""
    x = random_images(seed)
    assert contains(start(x, threat, torch.Generator().manual_seed(seed)), x, threat).all()


@given(threats, seeds, seeds)
def test_bytes_stay_inside_the_ball(threat: Threat, seed: int, other: int) -> None:
    """Quantised adversarial images lie in the ball in integer arithmetic, for every radius and both norms."""
    images = (random_images(seed) * 255).round().to(torch.uint8)
    x = images.float() / 255
    adversarial = to_uint8(project(random_images(other, spread=4.0), x, threat), x, threat)
    assert contains_uint8(adversarial, images, threat).all()


@given(st.integers(0, 255), seeds)
def test_bytes_use_the_whole_grid_ball(steps: int, seed: int) -> None:
    """At eps = n/255 a full step survives quantisation exactly: nothing of the radius is wasted."""
    threat = Threat("linf", steps / 255)
    images = (random_images(seed) * 255).round().to(torch.uint8)
    x = images.float() / 255
    moved = to_uint8(project(x + 2.0, x, threat), x, threat)
    assert torch.equal(moved.int(), (images.int() + steps).clamp(max=255))


def test_membership_is_strict_by_one_byte() -> None:
    """One grey level beyond floor(255 eps) is outside."""
    images = torch.full((1, 3, 2, 2), 100, dtype=torch.uint8)
    threat = Threat.parse("linf", "20.4/255")
    assert contains_uint8(images + 20, images, threat).all()
    assert not contains_uint8(images + 21, images, threat).any()


@pytest.mark.parametrize(("eps", "grid"), [("20.4/255", 20), ("8/255", 8), ("0.5/255", 0), ("0.08", 20), ("1", 255)])
def test_radius_is_rounded_down_to_the_grid(eps: str, grid: int) -> None:
    """20.4/255 becomes 20/255; a whole number of 255ths stays what it is."""
    assert Threat.parse("linf", eps).on_grid().eps == pytest.approx(grid / 255)


@settings(max_examples=255)
@given(st.integers(1, 255))
def test_every_whole_radius_survives_the_grid(steps: int) -> None:
    """n/255 is never rounded down to n - 1 by floating point."""
    threat = Threat.parse("linf", f"{steps}/255")
    assert threat.on_grid().eps == pytest.approx(steps / 255)
    assert threat.label == f"{steps}/255"


@pytest.mark.parametrize("text", ["8/0", "eight", "", "1/2/3", "8,0/255"])
def test_nonsense_radius_is_refused(text: str) -> None:
    """What is no number is bad input that quotes itself."""
    with pytest.raises(BadInput, match="is no radius"):
        parse_eps(text)


@pytest.mark.parametrize(("norm", "eps"), [("l1", 0.1), ("linf", -1.0), ("l2", math.nan), ("linf", math.inf)])
def test_impossible_threat_is_refused(norm: str, eps: float) -> None:
    """Unknown norms and negative or non-finite radii never become a threat."""
    with pytest.raises(BadInput, match="threat"):
        Threat(norm, eps)


def test_norms_agree_with_numpy() -> None:
    """Lengths equal numpy's, an independent implementation."""
    import numpy as np

    delta = random_images(5)
    flat = delta.flatten(1).numpy()
    assert np.allclose(norms(delta, "linf"), np.linalg.norm(flat, np.inf, axis=1))
    assert np.allclose(norms(delta, "l2"), np.linalg.norm(flat, 2, axis=1))
