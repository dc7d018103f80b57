"""Common corruptions: the same bytes each time, of any size, as strong as their severity, pinned by golden pictures."""

from __future__ import annotations

import inspect
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from sklearn.datasets import load_sample_images
from torch import Tensor

from dfmcl.common.errors import BadInput
from dfmcl.robustness.attacks.registry import Attack
from dfmcl.robustness.corruptions import registry
from dfmcl.robustness.corruptions.picture import plasma, streaked
from dfmcl.robustness.corruptions.registry import CORRUPTIONS, corrupted
from dfmcl.robustness.corruptions.severities import LARGE, LEVELS, PUBLISHED
from dfmcl.robustness.threats.registry import parse_threat
from dfmcl.robustness.threats.transforms import Transforms

GOLDEN = Path(__file__).parents[1] / "fixtures" / "corruptions.npz"
BLOCK = 16  # pixels; of the larger golden pictures only means of such squares are kept
Bytes = NDArray[np.uint8]


@cache
def photographs(side: int) -> tuple[Bytes, ...]:
    """Squares of the two photographs that come with scikit-learn, made smaller."""
    places = ((0, 0), (100, 150))
    return tuple(
        np.asarray(Image.fromarray(one[top : top + 320, left : left + 320]).resize((side, side), Image.Resampling.BOX))
        for one in load_sample_images().images
        for top, left in places
    )


def fresh(image: Bytes, corruption: str, severity: int) -> Bytes:
    """Not what a call before has left in the cache."""
    registry._corrupted.cache_clear()
    return corrupted(image, corruption, severity)


@pytest.mark.parametrize("side", [32, 224])
@pytest.mark.parametrize("corruption", CORRUPTIONS)
def test_the_same_bytes_of_the_same_shape(corruption: str, side: int) -> None:
    """An image and a severity give the same bytes again; the shape stays, in colour and in grey, square or wide."""
    image = photographs(side)[0]
    for picture in (image,) if side > LARGE else (image, image[:, :, :1], image[: side - 5]):
        once = fresh(picture, corruption, 3)
        assert np.array_equal(once, fresh(picture, corruption, 3))
        assert (once.dtype, once.shape) == (np.dtype(np.uint8), picture.shape)
        assert not np.array_equal(once, picture)


def test_each_image_has_its_own_draws() -> None:
    """Of two images that differ by a level somewhere, the noise differs everywhere; severities share it."""
    image = photographs(32)[0]
    other = image.copy()
    other[0, 0, 0] ^= 1
    assert (corrupted(other, "gaussian_noise", 3) != corrupted(image, "gaussian_noise", 3)).mean() > 0.9
    low, high = (corrupted(image, "gaussian_noise", level).astype(float) - image for level in (1, 2))
    assert np.corrcoef(low.ravel(), high.ravel())[0, 1] > 0.9


# Where a published parameter turns back from one severity to the next, so does what it does.
TURNING = {
    32: {"glass_blur", "motion_blur", "snow", "frost", "elastic_transform"},
    224: {"glass_blur", "snow", "frost", "elastic_transform"},
}


@pytest.mark.parametrize("side", [32, 224])
@pytest.mark.parametrize("corruption", CORRUPTIONS)
def test_a_higher_severity_changes_more(corruption: str, side: int) -> None:
    """The mean squared change grows with each severity, on average over photographs."""
    pictures = photographs(side)[: 4 if side == 32 else 1]
    change = [
        np.mean([((corrupted(one, corruption, level).astype(float) - one) ** 2).mean() for one in pictures])
        for level in LEVELS
    ]
    if corruption in TURNING[side]:
        assert min(change) > 1
        assert side == 32 or corruption == "elastic_transform" or change[4] > change[0]
    else:
        assert all(low < high for low, high in pairwise(change)), change


def test_every_corruption_is_published_and_takes_what_is_published() -> None:
    """Both tables have the fifteen; each function takes as many parameters as its rows hold, at both sizes."""
    assert CORRUPTIONS.keys() == PUBLISHED.keys()
    assert len(CORRUPTIONS) == 15
    for name, function in CORRUPTIONS.items():
        takes = len(inspect.signature(function).parameters) - 2
        for rows in PUBLISHED[name]:
            assert len(rows) == 5
            assert {len(row) for row in rows} == {takes}
    assert PUBLISHED["fog"].of(LARGE - 1, 2) == (0.5, 3)
    assert PUBLISHED["fog"].of(LARGE, 2) == (2, 2)


def test_parts_do_as_they_say() -> None:
    """Plasma fills [0, 1]; a streak keeps the mean and goes one way; contrast and brightness by their formulas."""
    clouds = plasma((20, 24, 3), 2.0, np.random.RandomState(0))
    assert clouds.shape == (20, 24)
    assert clouds.min() >= 0
    assert clouds.max() <= 1
    assert clouds.std() > 0.05
    point = np.zeros((9, 9, 1))
    point[4, 4] = 1
    streak = streaked(point, 1, 1.0, 0)
    assert streak.sum() == pytest.approx(1)
    assert np.count_nonzero(streak[4] > 1e-9) == 3
    x, draw = photographs(32)[0] / 255, np.random.RandomState(0)
    assert np.allclose(CORRUPTIONS["contrast"](x, draw, 0.5).mean(axis=(0, 1)), x.mean(axis=(0, 1)))
    brighter = CORRUPTIONS["brightness"](x, draw, 0.1)
    assert np.allclose(brighter.max(axis=2), np.clip(x.max(axis=2) + 0.1, 0, 1))
    loud = CORRUPTIONS["gaussian_noise"](np.full((64, 64, 3), 0.5), draw, 0.1) - 0.5
    assert loud.std() == pytest.approx(0.1, rel=0.05)
    rare = CORRUPTIONS["impulse_noise"](np.full((64, 64, 3), 0.5), draw, 0.1)
    assert (rare != 0.5).mean() == pytest.approx(0.1, abs=0.01)


def golden_parts(corruption: str) -> tuple[Bytes, NDArray[np.float64]]:
    """Of a small picture all bytes, of a larger one the means of blocks."""
    large = corrupted(photographs(LARGE)[2], corruption, 4).astype(float)
    sides = LARGE // BLOCK
    return corrupted(photographs(16)[1], corruption, 5), large.reshape(sides, BLOCK, sides, BLOCK, 3).mean(axis=(1, 3))


@pytest.mark.parametrize("corruption", CORRUPTIONS)
def test_pictures_are_the_golden_ones(corruption: str) -> None:
    """Neither a change here nor another version of a library changes what a severity means.

    Within two levels, as another libjpeg or another processor's last digit may round a value otherwise; of all values
    99 in 100 must be the same.
    """
    with np.load(GOLDEN) as golden:
        small, means = golden[f"{corruption} small"], golden[f"{corruption} large"]
    found, found_means = golden_parts(corruption)
    apart = np.abs(found.astype(int) - small)
    assert apart.max() <= 2
    assert (apart == 0).mean() >= 0.99
    assert np.abs(found_means - means).max() < 0.1


@pytest.mark.parametrize("channels", [1, 3])
def test_membership_is_by_replay(channels: int) -> None:
    """The corrupted image is a member, one level away or at another severity it is none; grid finds it."""
    images = torch.from_numpy(np.stack(photographs(32)[:2])).permute(0, 3, 1, 2)[:, :channels].contiguous()
    threat = parse_threat("fog@3")
    assert isinstance(threat, Transforms)
    foggy = threat.transformed(images, torch.zeros(2, dtype=torch.long))
    assert threat.contains_uint8(foggy, images).all()
    assert not threat.contains_uint8(foggy.flip(0), images).any()
    assert not parse_threat("fog@2").contains_uint8(foggy, images).any()
    assert parse_threat("fog").contains_uint8(foggy, images).all()
    off = foggy.clone()
    off[0, 0, 5, 5] ^= 1
    assert threat.contains_uint8(off, images).tolist() == [False, True]

    def dim(x: Tensor) -> Tensor:  # class 1 where the image is foggy
        same = (x * 255).round().byte().flatten(1) == foggy[:1].flatten(1)
        return torch.nn.functional.one_hot(same.all(dim=1).long(), 2).float()

    y = torch.zeros(2, dtype=torch.long)
    x_adv = Attack.parse("grid")(dim, images.float() / 255, y, threat, generator=torch.Generator())
    assert dim(x_adv).argmax(dim=1).tolist() == [1, 0]


def test_all_are_seventy_five() -> None:
    """`corruptions` is every severity of every corruption; `fog` its five."""
    assert len(parse_threat("corruptions").parts) == 75
    assert [str(part) for part in parse_threat("fog").parts] == [f"fog@{level}" for level in LEVELS]
    with pytest.raises(BadInput, match="1 or 3 channels"):
        parse_threat("corruptions").fits((4, 32, 32))


if __name__ == "__main__":
    golden: dict[str, Any] = {
        f"{name} {what}": part
        for name in CORRUPTIONS
        for what, part in zip(("small", "large"), golden_parts(name), strict=True)
    }
    np.savez_compressed(
        GOLDEN,
        allow_pickle=False,
        **{name: np.float16(part) if "large" in name else part for name, part in golden.items()},
    )
