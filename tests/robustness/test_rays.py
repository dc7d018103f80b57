"""RayS: the best corner of a linear model by labels alone, its budget, and the paper's algorithm beside it."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from dfmcl.common.errors import BadInput
from dfmcl.robustness.attacks.rays import PRECISION, blocks, rays
from dfmcl.robustness.attacks.registry import Attack
from dfmcl.robustness.attacks.trial import Trial
from dfmcl.robustness.threats.l2 import L2
from dfmcl.robustness.threats.linf import Linf
from tests.linear import Linear, images, stream
from tests.robustness.test_apgd import SHAPE, greys, network


def test_crosses_just_beyond_the_optimum_and_never_before() -> None:
    """2 % beyond the closed-form distance an image falls within 800 queries; 2 % short of it none can."""
    model, x = Linear(SHAPE), images(3, SHAPE)
    y, least = model(x).argmax(dim=1), model.least(x, "linf")
    for factor, fooled in ((1.02, True), (0.98, False)):
        for i in range(len(x)):
            threat = Linf(factor * least[i].item())
            x_adv = rays(model, x[i : i + 1], y[i : i + 1], threat, generator=stream(), queries=800)
            assert threat.contains(x_adv, x[i : i + 1]).all()
            assert (model(x_adv).argmax(dim=1) != y[i]).item() is fooled


def test_an_image_that_holds_comes_back_on_the_best_ray() -> None:
    """Short of the border, every sign that matters is the one that leads towards it."""
    model, x = Linear(SHAPE), images(2, SHAPE)
    y, eps = model(x).argmax(dim=1), 0.9 * model.least(x, "linf").min().item()
    x_adv = rays(model, x, y, Linf(eps), generator=stream(), queries=1500)
    gained = (model.score(x_adv) - model.score(x)).abs().detach() / (eps * model.weight.abs().sum())
    assert (gained >= 0.99).all()
    assert (gained <= 1.001).all()


def bright(x: Tensor) -> Tensor:
    """Class 1 where the mean is above 0.6."""
    mean = x.flatten(1).mean(dim=1)
    return torch.stack([torch.full_like(mean, 0.6), mean], dim=1)


def test_a_ray_is_measured_by_halving() -> None:
    """From grey, white is 0.1 away: a radius just above is found in log2 of the range over the precision, or never."""
    x, y = torch.full((1, *SHAPE), 0.5), torch.tensor([0])
    for eps, found in ((0.1001, True), (0.0999, False)):
        trial = Trial(y)
        most = 2 + math.ceil(math.log2(1 / (PRECISION * eps)))
        rays(bright, x, y, Linf(eps), generator=stream(), queries=most, trial=trial)
        assert trial.fooled.item() is found


def test_only_labels_are_used() -> None:
    """Scores squashed to one-hot answers change nothing, and no gradient is asked for."""
    model, x = network(), greys(6)
    y, threat = model(x).argmax(dim=1), Linf(0.03)

    def labels(point: Tensor) -> Tensor:
        assert not torch.is_grad_enabled()
        return torch.eye(5)[model(point).argmax(dim=1)]

    by_scores, by_labels = (rays(ask, x, y, threat, generator=stream(), queries=150) for ask in (model, labels))
    assert torch.equal(by_scores, by_labels)


def test_one_query_per_live_image_and_step() -> None:
    """The images that hold cost exactly the budget, a fooled one nothing more; the trial counts what was asked."""
    model, x = network(), greys(24)
    y, sizes = model(x).argmax(dim=1), []

    def counted(point: Tensor) -> Tensor:
        sizes.append(len(point))
        return model(point)

    trial = Trial(y)
    x_adv = Attack.parse("rays-120")(counted, x, y, Linf(0.03), generator=stream(), trial=trial)
    assert torch.equal(model(x_adv).argmax(dim=1) != y, trial.fooled)
    assert 3 < trial.fooled.sum() < 21
    assert len(sizes) == 120
    assert sizes == sorted(sizes, reverse=True)
    assert sum(sizes) == int(trial.forward.sum())
    assert (trial.forward[~trial.fooled] == 120).all()
    assert (trial.forward[trial.fooled] < 120).any()
    assert not trial.backward.any()
    sizes.clear()
    rays(counted, x, y, Linf(1.0), generator=stream(), queries=3000)
    assert 0 not in sizes
    assert len(sizes) < 1000


def test_a_point_that_does_not_count_lets_the_search_go_on() -> None:
    """Where the frame confirms nothing, every image costs the whole budget, and all finds are noted."""
    model, x = network(), greys(8)
    y, threat = model(x).argmax(dim=1), Linf(0.1)
    never, always = Trial(y, lambda rows, points: torch.zeros(len(rows), dtype=torch.bool)), Trial(y)
    for trial in (never, always):
        x_adv = rays(model, x, y, threat, generator=stream(), queries=200, trial=trial)
        assert threat.contains(x_adv, x).all()
    assert (never.forward == 200).all()
    assert torch.equal(never.unconfirmed, always.fooled)
    assert always.fooled.sum() >= 3


@settings(max_examples=15, deadline=None)
@given(st.sampled_from([0.0, 0.03, 1.0]), st.sampled_from([0, 1, 3]), st.integers(0, 99))
def test_result_is_inside_and_repeatable(eps: float, count: int, seed: int) -> None:
    """In the ball and in [0, 1] for any batch size, whatever the images beside it."""
    model, x, threat = network(seed=seed), greys(count, seed), Linf(eps)
    y, before = model(x).argmax(dim=1), x.clone()
    x_adv = Attack.parse("rays-40")(model, x, y, threat, generator=stream())
    assert x_adv.shape == x.shape
    assert threat.contains(x_adv, x).all()
    assert torch.equal(x, before)
    for i in range(count):
        alone = Attack.parse("rays-40")(model, x[i : i + 1], y[i : i + 1], threat, generator=stream(seed))
        assert torch.equal(alone, x_adv[i : i + 1])


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 300))
def test_blocks_halve_down_to_single_values(size: int) -> None:
    """Nothing first; then each level covers all values once, in order, with twice the blocks; single values last."""
    first, last = blocks(size)
    spans = list(zip(first.tolist(), last.tolist(), strict=True))
    assert spans.pop(0) == (0, 0)
    count = 1
    while spans:
        level, spans = spans[:count], spans[count:]
        assert level[0][0] == 0
        assert level[-1][1] == size
        assert [end for _, end in level[:-1]] == [begin for begin, _ in level[1:]]
        assert all(begin < end for begin, end in level)
        if not spans:
            assert count == size
        count = min(2 * count, size)


def test_l2_is_refused() -> None:
    """Only Linf is defined, and the message says so."""
    model, x = network(), greys(2)
    with pytest.raises(BadInput, match=r"rays.*Linf.*L2"):
        rays(model, x, model(x).argmax(dim=1), L2(0.5), generator=stream())


def plain(model: nn.Module, x: Tensor, label: int, eps: float, queries: int) -> bool:
    """Algorithms 2 and 3 of the paper on one image `(1, C, H, W)`: whether it falls within the budget."""
    spent, sign, best, size = 0, torch.ones(x[0].numel()), 1.0, x[0].numel()

    def across(signs: Tensor, radius: float) -> bool:
        nonlocal spent
        spent += 1
        return spent <= queries and int(model((x + radius * signs.view_as(x)).clamp(0, 1)).argmax()) != label

    level, block = 0, 0
    while spent < queries and best > eps:
        width = math.ceil(size / 2**level)
        turned = sign.clone()
        turned[block * width : (block + 1) * width] *= -1
        if across(turned, best):
            low, high = 0.0, best
            while high - low > 1e-3 / math.sqrt(size):  # 1e-3 in the L2 norm, as its authors' code has it
                middle = (low + high) / 2
                low, high = (low, middle) if across(turned, middle) else (middle, high)
            if high < best:
                sign, best = turned, high
        block += 1
        if block * width >= size:
            level, block = level + 1, 0
    return best <= eps


def test_no_weaker_than_the_plain_algorithm() -> None:
    """At 300 queries no more of 40 images hold than under the paper's algorithm, image by image."""
    model, x = network(), greys(40)
    with torch.no_grad():
        y, eps = model(x).argmax(dim=1), 0.03
        there = [plain(model, x[i : i + 1], int(y[i]), eps, 300) for i in range(len(x))]
    trial = Trial(y)
    rays(model, x, y, Linf(eps), generator=stream(), queries=300, trial=trial)
    assert 10 <= sum(there) <= 35, "the budget must leave something to compare"
    assert trial.fooled.sum() >= sum(there)
