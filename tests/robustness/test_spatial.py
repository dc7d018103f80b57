"""Rotation and translation: exact on a grid, the same bytes everywhere, told by replay."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage
from torch import Tensor

from dfmcl.common.errors import BadInput
from dfmcl.robustness.attacks.registry import Attack
from dfmcl.robustness.attacks.trial import Trial
from dfmcl.robustness.losses import margin
from dfmcl.robustness.threats.registry import parse_threat
from dfmcl.robustness.threats.spatial import Spatial
from tests.linear import stream
from tests.robustness.test_apgd import network

BOTH = "rotation:30+shift:20%"


def pictures(seed: int, count: int = 3, side: int = 6, channels: int = 3) -> Tensor:
    """Random bytes `(N, C, H, W)`; a larger one is wider than high."""
    shape = (count, channels, side, side if side < 8 else side + 3)
    return torch.randint(0, 256, shape, generator=stream(seed)).to(torch.uint8)


def spatial(text: str) -> Spatial:
    threat = parse_threat(text)
    assert isinstance(threat, Spatial)
    return threat


def every(threat: Spatial, images: Tensor) -> Tensor:
    """All transforms of each image: `(M, N, C, H, W)`."""
    whole = range(threat.count(tuple(images.shape[1:])))
    return torch.stack([threat.transformed(images, torch.full((len(images),), number)) for number in whole])


@given(
    st.sampled_from(
        [
            f"{BOTH},3x3x3",
            "rotation:45,5x1x1",
            "shift:2,1x3x3",
            "rotation:9+shift:1,3x3x5,nearest,edge",
            "rotation:30,9x1x1,edge",
        ]
    ),
    st.integers(0, 99),
    st.sampled_from([6, 9]),
    st.sampled_from([1, 3]),
)
@settings(max_examples=8)
def test_the_image_is_a_member_and_so_is_each_transform(text: str, seed: int, side: int, channels: int) -> None:
    """The middle of the grid is the image itself; each transform is found by replay, one grey level away is not."""
    threat, images = spatial(text), pictures(seed, 2, side, channels)
    whole = threat.count(tuple(images.shape[1:]))
    assert threat.placed(whole // 2, tuple(images.shape[1:])) == (0, 0, 0)
    assert torch.equal(threat.transformed(images, torch.full((2,), whole // 2)), images)
    moved = threat.transformed(images, torch.tensor([0, whole - 1]))
    assert threat.contains_uint8(moved, images).all()
    assert threat.contains_uint8(images, images).all()
    assert threat.contains(moved.float() / 255, images.float() / 255).all()
    moved[0, 0, 2, 2] ^= 1
    assert threat.contains_uint8(moved, images).tolist() == [False, True]


def test_a_whole_shift_is_a_shift_and_a_quarter_turn_is_one() -> None:
    """Against numpy: whole pixels move unchanged, black or the edge comes in; 90 degrees are counter-clockwise."""
    images = pictures(3, 1, 6)
    for padding, mode in (("black", "constant"), ("edge", "edge")):
        threat = spatial(f"shift:2,1x5x5,{padding}")
        for number, found in enumerate(every(threat, images)):
            _, down, right = (int(value) for value in threat.placed(number, (3, 6, 6)))
            padded = np.pad(images[0].numpy(), ((0, 0), (2, 2), (2, 2)), mode=mode)  # type: ignore[call-overload]
            assert np.array_equal(found[0].numpy(), padded[:, 2 - down : 8 - down, 2 - right : 8 - right]), number
    quarter = spatial("rotation:90,3x1x1")
    assert quarter.placed(2, (3, 6, 6)) == (90, 0, 0)
    assert np.array_equal(every(quarter, images)[2, 0].numpy(), np.rot90(images[0].numpy(), axes=(1, 2)))


def test_bilinear_is_scipys() -> None:
    """Beside scipy's interpolation in floating point: half a level of rounding and the weights' 2^-8 apart."""
    threat, images = spatial("rotation:30+shift:1"), pictures(4, 1, 9, 1)
    height, width = images.shape[2:]
    centre = np.array([(height - 1) / 2, (width - 1) / 2])
    for number, found in enumerate(every(threat, images)):
        turned, *moved = threat.placed(number, (1, height, width))
        cosine, sine = math.cos(math.radians(turned)), math.sin(math.radians(turned))
        back = np.array([[cosine, sine], [-sine, cosine]])
        offset = centre - back @ (centre + np.array(moved))
        expected = ndimage.affine_transform(
            np.pad(images[0, 0].numpy().astype(float), 20), back, offset + 20 - back @ np.array([20.0, 20.0]), order=1
        )[20:-20, 20:-20]
        assert np.abs(found[0, 0].numpy() - expected).max() < 0.5 + 2 * 255 / 256 + 1e-6, number


@pytest.mark.parametrize("count", [0, 1, 12])
def test_grid_is_the_worst_case_over_all_transforms(count: int) -> None:
    """An image holds exactly where a plain loop over all 125 finds nothing; a survivor's point has the best margin."""
    model, threat = network(), spatial("rotation:10+shift:20%,edge")
    images = 100 + pictures(7, count) // 6
    x = images.float() / 255
    y = model(x).argmax(dim=1)
    trial = Trial(y)
    x_adv = Attack.parse("grid")(model, x, y, threat, generator=stream(), trial=trial)
    margins = torch.stack([margin(model(one.float() / 255), y) for one in every(threat, images)])
    holds = (margins <= 0).all(dim=0)
    assert torch.equal(model(x_adv).argmax(dim=1) == y, holds)
    assert torch.allclose(margin(model(x_adv), y)[holds], margins.amax(dim=0)[holds], atol=1e-5)
    assert threat.contains_uint8((x_adv * 255).round().byte(), images).all()
    assert (trial.forward[holds] == 125).all()
    if count == 12:
        assert 0 < holds.sum() < 12


def test_a_draw_is_seeded_and_as_long_as_said() -> None:
    """Of a larger grid so many are drawn, each once, other ones for another seed; a draw of all is the whole grid."""
    model, threat, images = network(), spatial("rotation:30+shift:20%,31x5x5"), pictures(7, 8)
    x = images.float() / 255
    y = model(x).argmax(dim=1)
    asked: list[Tensor] = []

    def stubborn(points: Tensor) -> Tensor:  # right whatever it is shown
        asked.append(points)
        return torch.nn.functional.one_hot(y, 5).float()

    shown = []
    for seed in (0, 0, 1):
        asked.clear()
        trial = Trial(y)
        Attack.parse("grid-40")(stubborn, x, y, threat, generator=stream(seed), trial=trial)
        assert (trial.forward == 40).all()
        shown.append(torch.stack(asked))
    assert torch.equal(shown[0], shown[1])
    assert not torch.equal(shown[0], shown[2])
    assert all(len({bytes(p.mul(255).byte().numpy()) for p in shown[0][:, i]}) == 40 for i in range(8))
    once, twice = (Attack.parse(name)(model, x, y, spatial(BOTH), generator=stream(3)) for name in ("grid", "grid-999"))
    assert torch.equal(once, twice)


@pytest.mark.parametrize(
    "text",
    ["rotation", "rotation:0", "rotation:200", "rotation:x", "shift:100%", "shift:1.5", "rotation:9+rotation:9",
     "rotation:9,4x1x1", "rotation:9,5x5", "rotation:9,cubic", "rotation:9+patch:3", "rotation:9,99999x9x9", "shift:0"],
)  # fmt: skip
def test_a_rotation_that_makes_no_sense_is_refused(text: str) -> None:
    """Never another threat than the one that was meant."""
    with pytest.raises(BadInput, match="threat"):
        parse_threat(text)


def test_a_shift_needs_room() -> None:
    """By no pixel, or out of sight."""
    for text in ("shift:10%", "shift:9"):
        with pytest.raises(BadInput, match="no pixel"):
            parse_threat(text).fits((3, 9, 9))
    parse_threat("shift:20%").fits((3, 9, 9))
