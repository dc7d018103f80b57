"""Threats in the pool: what training crafts is what the threat allows, as far as the curriculum has come."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from dfmcl.common.errors import BadInput
from dfmcl.robustness.attacks.patch import gains
from dfmcl.robustness.data import Dataset
from dfmcl.robustness.losses import cross_entropy
from dfmcl.robustness.threats.registry import FAMILIES, parse_threat
from dfmcl.robustness.threats.spatial import Spatial
from dfmcl.robustness.threats.threat import as_levels
from dfmcl.training.adversary import CRAFTS
from dfmcl.training.config import ATTACKS, POOLED, load_config
from dfmcl.training.crafts import OF_THREAT, craft_of
from dfmcl.training.noise import Noise
from tests.linear import Linear, stream
from tests.training.workshop import batch, learner

SHAPE = (3, 16, 16)
MEMBERS = ["patch:5x5", "patch:4%", "rotation:30", "shift:20%", "rotation:20+shift:2", "fog", "corruptions", "l2:1.0"]


def levels(count: int, shape: tuple[int, int, int] = SHAPE) -> Tensor:
    """Images of whole grey levels."""
    return torch.randint(0, 256, (count, *shape), generator=stream(3)).float() / 255


def crafted(member: str, x: Tensor, done: float = 1.0, noise: Noise | None = None, steps: int = 5) -> Tensor:
    """By a linear classifier's own answers as labels."""
    model = Linear(tuple(x.shape[1:]))  # type: ignore[arg-type]  # three numbers
    chosen = noise or Noise(stream())
    y = model(x).argmax(dim=1)
    return craft_of(member, tuple(x.shape[1:]))(model, x, y, 0.03, chosen, steps=steps, step_ratio=2.5, done=done)


@pytest.mark.parametrize("member", MEMBERS)
@pytest.mark.parametrize("done", [1.0, 0.5])
def test_what_is_crafted_is_a_member(member: str, done: float) -> None:
    """Of the threat, whole or as far as the ramp has come; and images do change."""
    x = levels(6)
    x_adv = crafted(member, x, done)
    assert parse_threat(member).contains(x_adv, x).all()
    assert (x_adv != x).any()
    assert x_adv.dtype == x.dtype


@pytest.mark.parametrize(
    ("member", "half"),
    [("patch:6x6", "patch:3x3"), ("rotation:30", "rotation:14,15x1x1"), ("l2:1.0", "l2:0.5"), ("fog@5", "fog@3")],
)
def test_threats_grow_with_the_ramp(member: str, half: str) -> None:
    """Half way the threat of half the size holds what is crafted, which at the end it does not."""
    x = levels(8)
    smaller = parse_threat(half)  # of 31 angles 2 degrees apart those up to 15
    assert smaller.contains(crafted(member, x, 0.5), x).all()
    assert not smaller.contains(crafted(member, x, 1.0), x).all()


def test_half_of_the_squares_lie_where_they_pay_most() -> None:
    """Of a linear model, where the best square and its best values have a closed form; none is above it."""
    model, x = Linear((3, 8, 8)), levels(24, (3, 8, 8))
    y = model(x).argmax(dim=1)
    sign = torch.where(y == 1, -1.0, 1.0).view(-1, 1, 1, 1)  # the score falls where class 1 is right
    best = gains(sign * model.weight.detach().expand_as(x), x, 3).flatten(1).amax(dim=1)
    reached = (sign.flatten() * (model.score(crafted("patch:3x3", x, steps=8)) - model.score(x))).detach()
    assert (reached <= best + 1e-3).all()
    share = torch.isclose(reached, best, atol=1e-3).float().mean()
    assert 0.2 < share < 0.9


def test_the_worst_of_many_moves_is_the_worst_of_all() -> None:
    """Three angles are soon all tried."""
    x = levels(8)
    model = Linear(SHAPE)
    y = model(x).argmax(dim=1)
    threat = parse_threat("rotation:30,3x1x1")
    assert isinstance(threat, Spatial)
    every = [threat.transformed(as_levels(x), torch.full((8,), number)) for number in range(3)]
    worst = torch.stack([cross_entropy(model(one.float() / 255), y) for one in every]).amax(dim=0)
    found = cross_entropy(model(crafted("rotation:30,3x1x1", x, steps=40)), y)
    assert torch.allclose(found, worst)


@pytest.mark.parametrize("member", MEMBERS)
def test_parts_of_a_batch_meet_the_numbers_of_the_whole(member: str) -> None:
    """As processes share it, each with its own images."""
    x = levels(6)
    whole = crafted(member, x)
    halves = [crafted(member, x[3 * rank : 3 * rank + 3], noise=Noise(stream(), rank, 2)) for rank in (0, 1)]
    assert torch.allclose(torch.cat(halves), whole, atol=1e-6)


def test_each_kind_of_threat_is_crafted_or_refused() -> None:
    """The config, which knows no torch, names the kinds that the pool has attacks for."""
    assert {*OF_THREAT, "corruption"} == set(POOLED)
    assert set(CRAFTS) == set(ATTACKS)
    for family in FAMILIES:
        for example in family.examples:
            if family.kind in POOLED:
                assert load_config("quickstart", [f"curriculum.attacks=['{example}']"]).curriculum.attacks == [example]
            else:
                with pytest.raises(BadInput, match="no threat that training crafts for"):
                    load_config("quickstart", [f"curriculum.attacks=['{example}']"])


@pytest.mark.parametrize(
    ("member", "why"),
    [
        ("pgdd", "choose one of fgsm, n-fgsm, pgd, cw, kl, or a threat: "),
        ("patch:3x4", "write a square such as patch:5x5"),
        ("patch:2x2|rotation:30", "is a union; name each part by itself"),
        ("patch:2x2|patch:3x3", "is a union; name each part by itself"),
    ],
)
def test_unknown_members_are_refused(member: str, why: str) -> None:
    """By the key, with what is known."""
    with pytest.raises(BadInput, match=r"curriculum\.attacks.*" + why):
        load_config("quickstart", [f"curriculum.attacks=['{member}']"])


def test_a_threat_without_room_ends_before_the_first_step(digits: Dataset) -> None:
    """Digits have 16 pixels a side."""
    with pytest.raises(BadInput, match="does not fit into images of 16x16"):
        learner(digits, "curriculum.attacks=['patch:17x17']")


@pytest.mark.parametrize("objective", ["ce", "trades"])
def test_a_mixed_pool_trains(digits: Dataset, objective: str) -> None:
    """Each member is drawn, masks and further views beside it; the weights move by finite numbers."""
    pool = "curriculum.attacks=['pgd','patch:4x4','rotation:15+shift:1','corruptions','l2:0.5']"
    one = learner(digits, pool, f"objective.name={objective}", "objective.views=1", "curriculum.steps=2")
    for step in range(1, 9):
        assert math.isfinite(float(one.update(*batch(digits), step)))
