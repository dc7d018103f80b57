"""The curriculum stays in its bounds and draws from its pool."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from robustness.threat import Threat
from tests.linear import Linear, images
from training.curriculum import draw, strength, training_attack

steps = st.integers(1, 10_000).flatmap(lambda total: st.tuples(st.integers(1, total), st.just(total)))


@given(steps, st.floats(1e-4, 1))
def test_strength_stays_within_bounds_and_grows(at: tuple[int, int], beta: float) -> None:
    """0 < S(t) <= beta, S grows with t, and reaches beta on the last step."""
    step, total = at
    assert 0 < strength(step, total, beta) <= beta * (1 + 1e-12)
    assert strength(step, total, beta) <= strength(min(step + 1, total), total, beta)
    assert strength(total, total, beta) == pytest.approx(beta)
    assert strength(step, total, beta, "constant") == beta


def test_strength_is_the_sources_line() -> None:
    """S(t) = beta t / T."""
    assert strength(25, 100, 0.08) == pytest.approx(0.02)


def test_attacks_are_drawn_evenly_and_repeatably() -> None:
    """Over 3,000 steps each of three attacks is drawn about 1,000 times (5 sigma), the same at each asking."""
    pool = ["fgsm", "pgd", "cw"]
    drawn = [draw(pool, 0, step) for step in range(3000)]
    assert drawn == [draw(pool, 0, step) for step in range(3000)]
    assert drawn != [draw(pool, 1, step) for step in range(3000)]
    assert all(abs(count - 1000) < 130 for count in Counter(drawn).values())
    assert len(Counter(drawn)) == 3


@pytest.mark.parametrize("name", ["fgsm", "pgd", "cw"])
def test_training_attacks_raise_the_loss_to_its_maximum(name: str) -> None:
    """Each attack of the pool reaches the closed-form optimum of a linear model."""
    model, x = Linear((3, 6, 6)), images(4, (3, 6, 6))
    y = model(x).argmax(dim=1)
    x_adv = training_attack(name, steps=5)(
        model, x, y, Threat("linf", 0.01), generator=torch.Generator().manual_seed(0)
    )
    drop = (model.score(x) - model.score(x_adv)).detach()
    assert torch.allclose(drop, 0.01 * model.weight.abs().sum().detach(), rtol=1e-3)
