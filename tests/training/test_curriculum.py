"""The curriculum stays in its bounds and draws from its pool."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dfmcl.training.adversary import CRAFTS, noisy_single_step
from dfmcl.training.curriculum import attack_steps, draw, progress, strength
from dfmcl.training.noise import Noise
from tests.linear import Linear, images

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


def test_weights_of_the_pool_are_frequencies() -> None:
    """A weight of three against one: 2,250 of 3,000, within 5 sigma."""
    counts = Counter(draw(["n-fgsm", "pgd"], 0, step, [3.0, 1.0]) for step in range(3000))
    assert abs(counts["n-fgsm"] - 2250) < 5 * (3000 * 0.75 * 0.25) ** 0.5


@given(steps, st.floats(0, 0.45), st.floats(0, 0.45))
def test_warmup_and_hold_bound_the_ramp(at: tuple[int, int], warmup: float, hold: float) -> None:
    """Nothing before the warm-up ends, beta in the hold, monotone between; both shapes meet in the middle."""
    step, total = at
    for schedule in ("linear", "cosine"):
        now = strength(step, total, 0.1, schedule, warmup, hold)
        assert 0 <= now <= 0.1 * (1 + 1e-9)
        assert now <= strength(min(step + 1, total), total, 0.1, schedule, warmup, hold) + 1e-12
        if step / total <= warmup:
            assert now == pytest.approx(0, abs=1e-9)
        if step / total >= 1 - hold:
            assert now == pytest.approx(0.1)
    assert strength(50, 100, 0.1, "cosine") == pytest.approx(0.05)
    assert strength(10, 100, 0.1, "cosine") < strength(10, 100, 0.1, "linear")


def test_attack_steps_grow_with_the_ramp() -> None:
    """From 2 to 5 in equal parts; 0 means they stay."""
    grown = [attack_steps(2, 5, progress(step, 100)) for step in range(1, 101)]
    assert (grown[0], grown[-1]) == (2, 5)
    assert grown == sorted(grown)
    assert attack_steps(10, 0, 0.7) == 10


@pytest.mark.parametrize("name", sorted(CRAFTS))
def test_training_attacks_raise_the_loss_to_its_maximum(name: str) -> None:
    """Each attack of the pool reaches the closed-form optimum of a linear model (N-FGSM's noise may go beyond)."""
    model, x = Linear((3, 6, 6)), images(4, (3, 6, 6))
    y = model(x).argmax(dim=1)
    noise = Noise(torch.Generator().manual_seed(0))
    x_adv = CRAFTS[name](model, x, y, 0.01, noise, steps=5, step_ratio=2.5)
    drop = (model.score(x) - model.score(x_adv)).detach()
    best = 0.01 * model.weight.abs().sum().detach()
    if name == "n-fgsm":
        assert (drop > 0.2 * best).all()
        assert (x_adv - x).abs().max() <= 0.03 + 1e-6
    elif name == "kl":  # away from the clean prediction, to either side
        assert torch.allclose(drop.abs(), best.expand_as(drop), rtol=1e-3)
    else:
        assert torch.allclose(drop, best.expand_as(drop), rtol=1e-3)


def test_n_fgsm_is_noise_plus_one_full_step() -> None:
    """x + U(-2 eps, 2 eps) + eps * sign, not brought back into the ball. de Jorge et al. 2022, algorithm 1."""
    model, x = Linear((3, 6, 6)), images(4, (3, 6, 6)).clamp(0.2, 0.8)
    y = model(x).argmax(dim=1)
    x_adv = noisy_single_step(model, x, y, 0.05, Noise(torch.Generator().manual_seed(0)))
    uniform = torch.rand(4, 3, 6, 6, generator=torch.Generator().manual_seed(0))
    step = x_adv - (x + 0.1 * (2 * uniform - 1))
    assert torch.allclose(step.abs(), torch.full_like(step, 0.05), atol=1e-6)
    assert (x_adv - x).abs().max() > 0.1  # outside the ball of 0.05, as it should be


def test_parts_of_a_batch_see_the_noise_of_the_whole() -> None:
    """Two processes' draws, one after the other, are the single process's."""
    whole = Noise(torch.Generator().manual_seed(0)).uniform(6, 2, 3)
    parts = [Noise(torch.Generator().manual_seed(0), rank, 2).uniform(3, 2, 3) for rank in (0, 1)]
    assert torch.equal(torch.cat(parts), whole)
