"""Square Attack: what random search must reach without a gradient, and its budget."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dfmcl.common.errors import BadInput
from dfmcl.robustness.attacks.registry import Attack
from dfmcl.robustness.attacks.square import _bumps, _patched, _shifted, _tiled, patch_side, square
from dfmcl.robustness.attacks.trial import Trial
from dfmcl.robustness.losses import margin
from dfmcl.robustness.threats.l2 import L2
from dfmcl.robustness.threats.linf import Linf
from dfmcl.robustness.threats.registry import threat_of
from tests.linear import Linear, images, stream
from tests.robustness.test_apgd import SHAPE, greys, network


def test_reaches_the_best_corner_of_a_linear_model() -> None:
    """The highest margin in the ball is known: never above it, and 95 % of the way after 1,500 queries."""
    model, x = Linear(SHAPE), images(4, SHAPE)
    y = model(x).argmax(dim=1)
    eps = 0.5 * model.least(x, "linf").min().item()
    with torch.no_grad():
        x_adv = square(model, x, y, Linf(eps), generator=stream(), queries=1500)
        gained = (margin(model(x_adv), y) - margin(model(x), y)) / (eps * model.weight.abs().sum())
    assert (gained <= 1.001).all()
    assert (gained >= 0.95).all()


def test_a_short_search_begins_with_the_large_patch() -> None:
    """The first proposal after the stripes is 0.8 of the image, however few queries there are."""
    x, points = greys(1), []

    def watched(point: Tensor) -> Tensor:  # the stripes come back as the best point, and are kept
        points.append(point)
        return torch.tensor([[float(len(points)), 0.0]])

    square(watched, x, torch.tensor([0]), Linf(0.1), generator=stream(), queries=2)
    changed = torch.nonzero((points[1] != points[0])[0].any(dim=0))
    assert patch_side(0, 2, 0.8, (6, 6)) == 5
    assert (changed.amax(dim=0) - changed.amin(dim=0) + 1).max() >= 4


def test_needs_no_gradient() -> None:
    """Behind a rounding, whose gradient is zero, PGD stands still and Square gets through; autograd stays off."""
    linear, x = Linear(SHAPE), images(4, SHAPE)

    def rounded(point: Tensor) -> Tensor:
        return linear(((point * 2048).round() / 2048).detach() + 0 * point)

    y = rounded(x).argmax(dim=1)
    threat = Linf(1.5 * linear.least(x, "linf").max().item())

    def scores(point: Tensor) -> Tensor:
        assert not torch.is_grad_enabled()
        return rounded(point)

    assert (rounded(square(scores, x, y, threat, generator=stream(), queries=1000)).argmax(dim=1) != y).all()
    assert (rounded(Attack.parse("pgd-20")(rounded, x, y, threat, generator=stream())).argmax(dim=1) == y).all()


@pytest.mark.parametrize(("norm", "eps"), [("linf", 0.02), ("l2", 0.2)])
def test_one_query_per_live_image_and_step(norm: str, eps: float) -> None:
    """The images that hold cost exactly the budget, a fooled one nothing more; batches only shrink."""
    model, x = network(), greys(48)
    y, sizes = model(x).argmax(dim=1), []

    def counted(point: Tensor) -> Tensor:
        sizes.append(len(point))
        return model(point)

    trial = Trial(y)
    x_adv = Attack.parse("square-60")(counted, x, y, threat_of(norm, eps), generator=stream(), trial=trial)
    held = int((model(x_adv).argmax(dim=1) == y).sum())
    assert sum(sizes) == int(trial.forward.sum())
    assert (trial.forward[~trial.fooled] == 60).all()
    assert not trial.backward.any()
    assert 0 < held < 48
    assert len(sizes) == 60
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[-1] >= held
    sizes.clear()
    square(counted, x, y, Linf(1.0), generator=stream(), queries=400)
    assert 0 not in sizes
    assert len(sizes) < 200


@pytest.mark.parametrize("seed", range(4))
def test_nothing_better_was_seen_than_what_is_returned(seed: int) -> None:
    """An image that holds comes back as the point of highest margin among all that were asked about."""
    model, x = network(seed=seed), greys(1, seed)
    y, seen = model(x).argmax(dim=1), []

    def watched(point: Tensor) -> Tensor:
        seen.append(margin(model(point), y).item())
        return model(point)

    x_adv = square(watched, x, y, Linf(1e-4), generator=stream(), queries=80)
    assert max(seen) < 0, "eps is chosen so that every image holds"
    assert margin(model(x_adv), y).item() == max(seen)


@settings(max_examples=15, deadline=None)
@given(
    st.sampled_from(["linf", "l2"]), st.sampled_from([0.0, 0.03, 1.0]), st.sampled_from([0, 1, 3]), st.integers(0, 99)
)
def test_result_is_inside_and_repeatable(norm: str, eps: float, count: int, seed: int) -> None:
    """In the ball and in [0, 1] for any batch size; the same generator gives the same bytes."""
    model, x, threat = network(seed=seed), greys(count, seed), threat_of(norm, eps)
    y, before = model(x).argmax(dim=1), x.clone()
    attack = Attack.parse("square-20")
    x_adv = attack(model, x, y, threat, generator=stream(seed))
    assert x_adv.shape == x.shape
    assert threat.contains(x_adv, x).all()
    assert torch.equal(x_adv, attack(model, x, y, threat, generator=stream(seed)))
    assert torch.equal(x, before)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 3), st.integers(2, 9), st.integers(2, 9), st.data())
def test_a_proposal_is_one_square_at_the_border(channels: int, height: int, width: int, data: st.DataObject) -> None:
    """Each image changes somewhere, within one square of its own, and there to x +- eps alike in a channel."""
    side = data.draw(st.integers(1, min(height, width)))
    generator = stream(data.draw(st.integers(0, 99)))
    x = torch.full((6, channels, height, width), 0.5)
    current = torch.where(torch.rand(x.shape, generator=generator) < 0.5, x - 0.1, x + 0.1)
    proposed = _patched(current, x, Linf(0.1), side, generator)
    for before, after in zip(current, proposed, strict=True):
        changed = torch.nonzero((before != after).any(dim=0))
        assert len(changed)
        extent = changed.amax(dim=0) - changed.amin(dim=0) + 1
        assert (extent <= side).all()
        for plane, moved in zip(after, before != after, strict=True):
            assert len(plane[moved].unique()) <= 1


def test_squares_lie_apart_and_everywhere() -> None:
    """Places are drawn image by image, and every pixel is reached."""
    x = torch.full((400, 1, 5, 5), 0.5)
    moved = _patched(x, x, Linf(0.1), 2, stream()) != x
    assert (moved.flatten(1).sum(dim=1) == 4).all()
    assert len(moved.flatten(1).unique(dim=0)) == 16
    assert moved.any(dim=0).all()


def test_patch_shrinks_as_in_the_paper() -> None:
    """p = 0.8 of 32x32 at first, halved after 10, 50, 200, ... of 10,000 queries; one pixel at the end."""
    sides = [patch_side(proposal, 10_000, 0.8, (32, 32)) for proposal in (0, 10, 11, 51, 201, 8001)]
    assert sides == [29, 29, 20, 14, 10, 1]
    assert patch_side(51, 5000, 0.8, (32, 32)) == patch_side(102, 10_000, 0.8, (32, 32))
    assert patch_side(29, 30, 0.8, (32, 32)) == patch_side(29, 2000, 0.8, (32, 32)) == 14
    assert patch_side(0, 10_000, 0.8, (2, 50)) == 2


# --- L2 -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", range(1, 12))
def test_a_bump_is_the_one_of_the_paper(side: int) -> None:
    """Equation 5: layers 1/k^2 that grow from the middle of each half; halves of length 1 and opposite sign."""
    wanted = torch.zeros(side, side)
    for top, bottom, sign in ((0, side // 2, 1), (side // 2, side, -1)):
        height = bottom - top
        for layer in range(max(height, side) // 2 + 1):
            for row in range(height):
                for column in range(side):
                    if max(abs(row - height // 2), abs(column - side // 2)) <= layer:
                        wanted[top + row, column] += 1 / (layer + 1) ** 2
        if height:
            wanted[top:bottom] *= sign / wanted[top:bottom].norm()
    wanted /= wanted.norm()
    bumps = _bumps(40, 3, side, wanted, stream()).flatten(0, 1)
    forms = [sign * bump for bump in (wanted, wanted.T) for sign in (1, -1)]
    near = torch.stack([(bumps - form).abs().amax(dim=(1, 2)) < 1e-5 for form in forms])
    assert near.any(dim=0).all()
    assert near.any(dim=1).all(), "upright and not, up and down"


@pytest.mark.parametrize("share", [1.0, 0.5])
@pytest.mark.parametrize("size", [(5, 5), (5, 9), (2, 7), (15, 15)])
def test_an_l2_proposal_moves_the_radius(size: tuple[int, int], share: float) -> None:
    """Outside of two squares only the scale changes; what they held, and the unused radius, goes into a bump in one."""
    threat, x = L2(0.3), torch.full((20, 3, *size), 0.5)
    current = x + share * (_tiled(x, threat, stream(1)) - x)
    before = current - x
    assert torch.allclose(L2.lengths(before), torch.tensor(0.3 * share))
    after = _shifted(current, x, threat, 3, stream(2)) - x
    assert torch.allclose(L2.lengths(after), torch.tensor(0.3))
    if size != (15, 15):
        return
    emptied = (after == 0).all(dim=1).flatten(1).sum(dim=1)
    assert (emptied == 9).sum() >= 12, "of 20: all but where the two squares overlap, or a bump undoes the old one"
    for old, new in zip(before, after, strict=True):  # two squares are less than a tenth of the image
        scale = (new / old).median()
        changed = ~torch.isclose(new, scale * old, rtol=1e-3, atol=1e-6).all(dim=0)
        assert 9 <= changed.sum() <= 18
        inside = 3 * (old * changed).square().sum() + threat.eps**2 - old.square().sum()
        assert torch.isclose((new / scale * changed).square().sum(), inside, rtol=0.02)


def test_l2_climbs_towards_the_best_point_of_a_linear_model() -> None:
    """Never above the best margin in the ball, and half the way after 600 queries, where weights are smooth."""
    model, x = Linear(SHAPE), images(4, SHAPE)
    with torch.no_grad():
        model.weight.copy_(torch.linspace(-1, 1, 6).expand(SHAPE))
        model.bias.fill_(0.4)
    y = model(x).argmax(dim=1)
    eps = 0.5 * model.least(x, "l2").min().item()
    with torch.no_grad():
        x_adv = square(model, x, y, L2(eps), generator=stream(), queries=600)
        gained = (margin(model(x_adv), y) - margin(model(x), y)) / (eps * model.weight.norm())
    assert (gained <= 1.001).all()
    assert (gained >= 0.5).all()


def test_the_number_of_a_name_is_that_of_queries() -> None:
    """`square-1000` asks 1,000 times; alone it asks the default, and restarts make no sense."""
    assert Attack.parse("square-1000").parameters == {"queries": 1000}
    assert Attack.parse("square").parameters == {}
    with pytest.raises(BadInput, match="restarts"):
        Attack.parse("square-100x2")
