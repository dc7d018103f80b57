"""Augmentations against torchvision on single images, against loops, and against the probabilities they promise."""

from __future__ import annotations

from collections import Counter
from typing import Any, get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as vision

from dfmcl.training import policies
from dfmcl.training.augmentation import AUGMENTATIONS, augment, crop, crop_shift, erase, flip, idbh
from dfmcl.training.config import Augmentation
from dfmcl.training.policies import COLOUR_SHAPE, NAMES, OPERATIONS, Policy, Step, cifar10_policy, draw, follow

KINDS = tuple(AUGMENTATIONS)
SHAPES = [(8, 8, 3), (9, 13, 1), (16, 16, 3), (17, 17, 3), (32, 32, 3), (33, 28, 1)]
THEIRS = {
    "ShearY": "shear-y", "TranslateX": "translate-x", "TranslateY": "translate-y", "Rotate": "rotate",
    "Brightness": "brightness", "Color": "saturation", "Contrast": "contrast", "Sharpness": "sharpness",
    "Posterize": "posterize", "Solarize": "solarize", "AutoContrast": "autocontrast", "Equalize": "equalize",
    "Invert": "invert",
}  # fmt: skip


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def noise(*shape: int, seed: int = 0) -> Tensor:
    """Random bytes with some structure: flat areas make ties, and histograms with holes."""
    values = torch.randint(0, 256, shape, generator=seeded(seed), dtype=torch.uint8)
    return torch.where(torch.rand(shape, generator=seeded(seed + 1)) < 0.2, torch.full_like(values, 170), values)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_autoaugment_steps_are_torchvisions(shape: tuple[int, int, int]) -> None:
    """Each of the 50 steps, with either sign, does to a batch exactly what torchvision does to each image alone."""
    height, width, channels = shape
    reference = v2.AutoAugment(v2.AutoAugmentPolicy.CIFAR10)
    images = noise(4, channels, height, width)
    ours = [step for steps in cifar10_policy(height, width) for step in steps]
    theirs = [step for steps in reference._policies for step in steps]
    for step, (name, probability, level) in zip(ours, theirs, strict=True):
        assert (step.operation, step.probability) == (THEIRS[name], probability)
        magnitudes, signed = reference._AUGMENTATION_SPACE[name]
        scale = magnitudes(10, height, width)
        for sign in (1, -1) if signed else (1,):
            magnitude = 0.0 if scale is None else float(scale[level]) * sign
            alike = {"interpolation": reference.interpolation, "fill": reference._fill}
            alone = [reference._apply_image_or_video_transform(image, name, magnitude, **alike) for image in images]
            drawn = torch.full((4,), step.centre + sign * step.low, dtype=torch.float64)
            assert step.low == step.high
            assert torch.equal(OPERATIONS[step.operation](images, drawn), torch.stack(alone)), (step, sign)


def centred_shear(image: Tensor, x: float, y: float) -> Tensor:
    degrees = [torch.rad2deg(torch.tensor(slope, dtype=torch.float64).atan()).item() for slope in (x, y)]
    return vision.affine(image, angle=0.0, translate=[0, 0], scale=1.0, shear=degrees)


ALONE = {
    "saturation": vision.adjust_saturation,
    "brightness": vision.adjust_brightness,
    "contrast": vision.adjust_contrast,
    "sharpness": vision.adjust_sharpness,
    "autocontrast": lambda image, _: vision.autocontrast(image),
    "equalize": lambda image, _: vision.equalize(image),
    "rotate": vision.rotate,
    "shear-x-centred": lambda image, slope: centred_shear(image, slope, 0.0),
    "shear-y-centred": lambda image, slope: centred_shear(image, 0.0, slope),
}


@pytest.mark.parametrize("step", sorted({step for (step,) in COLOUR_SHAPE}, key=str), ids=lambda step: step.operation)
@pytest.mark.parametrize("shape", [(16, 16, 3), (11, 9, 1)], ids=str)
def test_colour_shape_operations_are_torchvisions(step: Step, shape: tuple[int, int, int]) -> None:
    """At magnitudes from the whole range, another one for each image, the batch is torchvision's images one by one."""
    height, width, channels = shape
    images = noise(40, channels, height, width)
    magnitudes = draw(((step,),), 40, seeded())[1][0]
    alone = zip(images, magnitudes.tolist(), strict=True)
    expected = torch.stack([ALONE[step.operation](image, magnitude) for image, magnitude in alone])
    assert torch.equal(OPERATIONS[step.operation](images, magnitudes), expected)


def test_colour_shape_ranges_are_those_published() -> None:
    """Eight operations of 1/8, with the strengths of Li & Spratling's code: factors, slopes and degrees."""
    weights = Counter(step.operation.removesuffix("-centred") for (step,) in COLOUR_SHAPE)
    assert weights.pop("shear-x") + weights.pop("shear-y") == 2
    assert set(weights.values()) == {2}
    assert len(COLOUR_SHAPE) == 16
    ends = {step.operation: (step.centre - step.high, step.centre + step.high) for (step,) in COLOUR_SHAPE}
    assert ends["saturation"] == ends["sharpness"] == pytest.approx((0.1, 1.9))
    assert ends["brightness"] == ends["contrast"] == pytest.approx((0.5, 1.9))
    assert ends["rotate"] == (-10, 10)
    assert ends["shear-x-centred"] == ends["shear-y-centred"] == (-0.15, 0.15)


def outcomes(policy: Policy) -> dict[tuple[int, ...], float]:
    """Probability of every sequence of operations (len(NAMES) where a step does not happen), by enumeration."""
    total: Counter[tuple[int, ...]] = Counter()
    for steps in policy:
        branches: dict[tuple[int, ...], float] = {(): 1 / len(policy)}
        for step in steps:
            branches = {
                (*done, index): p * share
                for done, p in branches.items()
                for index, share in (
                    (NAMES.index(step.operation), step.probability),
                    (len(NAMES), 1 - step.probability),
                )
            }
        total.update(branches)
    return {sequence: p for sequence, p in total.items() if p > 0}


@pytest.mark.parametrize("policy", [cifar10_policy(32, 32), COLOUR_SHAPE], ids=["autoaugment", "idbh"])
def test_draws_have_the_policys_probabilities(policy: Policy) -> None:
    """20,000 images: sequences of operations, signs and sizes are as the policy says, neighbours independent."""
    operations, magnitudes = draw(policy, 20_000, seeded(3))
    expected = outcomes(policy)
    seen = Counter(tuple(column) for column in operations.T.tolist())
    assert set(seen) <= set(expected)
    observed = [seen[sequence] for sequence in expected]
    assert stats.chisquare(observed, [20_000 * p for p in expected.values()]).pvalue > 1e-3

    first = operations[0]
    pairs = Counter(zip(first[::2].tolist(), first[1::2].tolist(), strict=True))
    present = first.unique().tolist()
    assert stats.chi2_contingency([[pairs[a, b] for b in present] for a in present]).pvalue > 1e-3

    centres = {step.operation: step.centre for steps in policy for step in steps if step.high}
    signed = [name in centres for name in NAMES] + [False]
    centre = torch.tensor([centres.get(name, 0.0) for name in (*NAMES, "")], dtype=torch.float64)
    away = (magnitudes - centre[operations])[torch.tensor(signed)[operations]]
    away = away[away != 0]  # level 0 is no change, of no sign
    assert stats.binomtest(int((away > 0).sum()), len(away)).pvalue > 1e-3


def test_magnitudes_fill_their_range() -> None:
    """centre ± U(low, high) where a step happens, by the Kolmogorov-Smirnov distance, whatever made it happen."""
    step = Step("rotate", probability=0.4, centre=3.0, low=1.0, high=10.0)
    operations, magnitudes = draw(((step,),), 5_000, seeded())
    away = magnitudes[operations == NAMES.index("rotate")] - 3
    assert len(away) == pytest.approx(2_000, abs=150)
    assert stats.kstest(away.abs().numpy(), stats.uniform(1, 9).cdf).pvalue > 1e-3
    assert (away < 0).double().mean() == pytest.approx(0.5, abs=0.05)


@pytest.mark.parametrize("policy", [cifar10_policy(16, 12), COLOUR_SHAPE], ids=["autoaugment", "idbh"])
def test_an_image_does_not_depend_on_its_batch(policy: Policy) -> None:
    """With its draws, an image alone comes out as it does among 100, whichever images share its operation."""
    images = noise(100, 16, 12, 3)
    drawn = draw(policy, 100, seeded(5))
    together = policies.apply(images, *drawn)
    for n in range(100):
        alone = policies.apply(images[n : n + 1], *(part[:, n : n + 1] for part in drawn))
        assert torch.equal(alone[0], together[n])


def test_steps_follow_one_another() -> None:
    """The second step works on what the first left; an image that drew nothing stays as it is, so does the input."""
    images = noise(3, 8, 8, 1)  # of one channel: moving the axis copies nothing
    before = images.clone()
    nothing, invert, brightness = len(NAMES), NAMES.index("invert"), NAMES.index("brightness")
    operations = torch.tensor([[invert, brightness, nothing], [brightness, invert, nothing]])
    result = policies.apply(images, operations, torch.full((2, 3), 0.5, dtype=torch.float64))
    assert torch.equal(result[0], (255 - images[0]) // 2)
    assert torch.equal(result[1], 255 - images[1] // 2)
    assert torch.equal(result[2], images[2])
    assert torch.equal(images, before)


def test_kinds_are_the_configurations() -> None:
    """What a configuration may ask for is there, and nothing else."""
    assert set(KINDS) == set(get_args(Augmentation))


@pytest.mark.parametrize("shape", [(6, 8, 8, 1), (5, 32, 32, 3), (4, 17, 9, 3)], ids=str)
def test_crop_and_flip_are_a_loop_over_images(shape: tuple[int, int, int, int]) -> None:
    """`crop` is a window of each padded image and `crop-flip` mirrors it, from the same draws in the same order."""
    images, generator = noise(*shape), seeded(7)
    count, height, width, _ = shape
    padding = height // 8
    offsets = torch.randint(2 * padding + 1, (2, count, 1), generator=generator)[..., 0].tolist()
    mirrored = (torch.rand(count, generator=generator) < 0.5).tolist()
    padded = torch.nn.functional.pad(images, (0, 0, padding, padding, padding, padding))
    moved = [image[i : i + height, j : j + width] for image, i, j in zip(padded, *offsets, strict=True)]
    turned = [image.flip(1) if turn else image for image, turn in zip(moved, mirrored, strict=True)]
    assert torch.equal(augment(images, seeded(7), "crop"), torch.stack(moved))
    assert torch.equal(augment(images, seeded(7), "crop-flip"), torch.stack(turned))


def test_autoaugment_crops_and_flips_first() -> None:
    """The policy is the last of the three, on the same stream of draws."""
    images, generator = noise(32, 16, 16, 3), seeded(1)
    moved = flip(crop(images, generator, padding=2), generator)
    assert torch.equal(augment(images, seeded(1), "autoaugment"), follow(cifar10_policy(16, 16), moved, generator))


def test_crop_shift_lays_a_window_down_elsewhere() -> None:
    """Every result is a window of its image on zeros, its size, origin and place as likely as the paper has it."""
    most, count = 5, 6_000
    image = torch.arange(1, 1 + 13 * 15, dtype=torch.uint8).view(1, 13, 15, 1)
    cuts, froms, tos = Counter[tuple[int, int]](), Counter[int](), Counter[int]()
    for result in crop_shift(image.expand(count, -1, -1, -1), seeded(2), most)[..., 0]:
        (top, *_, bottom), (left, *_, right) = (result.any(dim=1 - axis).nonzero()[:, 0].tolist() for axis in (0, 1))
        row, column = divmod(int(result[top, left]) - 1, 15)
        tall, wide = bottom - top + 1, right - left + 1
        expected = torch.zeros_like(result)
        expected[top : bottom + 1, left : right + 1] = image[0, row : row + tall, column : column + wide, 0]
        assert torch.equal(result, expected)
        cuts[13 - tall, 15 - wide] += 1
        if 13 - tall == 2:
            froms[row] += 1
            tos[top] += 1
    chances = {(s - x, x): 1 / (most + 1) / (s + 1) for s in range(most + 1) for x in range(s + 1)}
    assert set(cuts) == set(chances)
    assert stats.chisquare([cuts[k] for k in chances], [count * p for p in chances.values()]).pvalue > 1e-3
    for places in (froms, tos):
        assert set(places) == {0, 1, 2}
        assert stats.chisquare(list(places.values())).pvalue > 1e-3


def rectangle(image: Tensor) -> tuple[int, int, int, int]:
    """top, left, height and width of the zeros of an `(H, W)` image, a full rectangle or none."""
    rows, columns = ((image == 0).any(dim=1 - axis).nonzero()[:, 0].tolist() for axis in (0, 1))
    assert int((image == 0).sum()) == len(rows) * len(columns)
    return min(rows, default=-1), min(columns, default=-1), len(rows), len(columns)


@pytest.mark.parametrize(("height", "width"), [(32, 32), (8, 200)])
def test_erase_has_torchvisions_distribution(height: int, width: int) -> None:
    """Corner and sides of the erased rectangle, against as many draws of torchvision's RandomErasing.

    Of the long images 43 % keep all their pixels: not one of ten rectangles is lower than the image.
    """
    count = 800
    images = torch.full((count, height, width, 1), 255, dtype=torch.uint8)
    ours = [rectangle(image[..., 0]) for image in erase(images, seeded(4), 1.0)]
    with torch.random.fork_rng():
        torch.manual_seed(5)
        transform = v2.RandomErasing(p=1.0)
        theirs = [rectangle(transform(image.permute(2, 0, 1))[0]) for image in images]
    for mine, reference in zip(zip(*ours, strict=True), zip(*theirs, strict=True), strict=True):
        assert stats.ks_2samp(mine, reference).pvalue > 1e-3


def test_erase_takes_2_to_33_percent() -> None:
    """Areas of 2,000 rectangles reach both ends, but for rounding to whole pixels, and no further."""
    erased = erase(torch.full((2_000, 96, 96, 1), 255, dtype=torch.uint8), seeded(9), 1.0)
    share = (erased == 0).double().mean(dim=(1, 2, 3))
    assert 0.018 < share.min() < 0.025
    assert 0.32 < share.max() < 0.338


@pytest.mark.parametrize("probability", [0.0, 0.3, 1.0])
def test_erase_happens_with_its_probability(probability: float) -> None:
    """The share of images with a hole."""
    images = torch.full((4_000, 12, 12, 3), 255, dtype=torch.uint8)
    hit = (erase(images, seeded(6), probability) == 0).any(dim=(1, 2, 3))
    assert stats.binomtest(int(hit.sum()), len(hit), probability).pvalue > 1e-3


def test_strong_idbh_erases_every_image() -> None:
    """erasing = 1 is the strong variant: the weak one's image, with a hole in it."""
    images = noise(64, 16, 16, 3)
    weak, strong = idbh(images, seeded(8)), idbh(images, seeded(8), erasing=1.0)
    changed = (weak != strong).any(dim=(1, 2, 3))
    assert 16 < int(changed.sum()) < 48
    assert (strong[weak != strong] == 0).all()


@settings(max_examples=60, deadline=None)
@given(
    kind=st.sampled_from(KINDS),
    count=st.integers(1, 12),
    height=st.integers(8, 40),
    width=st.integers(8, 40),
    channels=st.sampled_from([1, 3]),
    flat=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_bytes_in_bytes_out(
    kind: str, count: int, height: int, width: int, channels: int, flat: bool, seed: int
) -> None:
    """Any size, one channel or three, flat images too: uint8 of the same shape, the same again from the same seed."""
    images = noise(count, height, width, channels, seed=seed)
    images = images[:, :1, :1].expand_as(images).contiguous() if flat else images
    before = images.clone()
    result = augment(images, seeded(seed), kind)
    assert (result.dtype, result.shape) == (torch.uint8, images.shape)
    assert result.is_contiguous()
    assert torch.equal(images, before)
    assert torch.equal(augment(images, seeded(seed), kind), result)


@pytest.mark.parametrize("kind", ["crop-flip", "autoaugment", "idbh"])
def test_images_of_a_batch_draw_for_themselves(kind: str) -> None:
    """One image 64 times over becomes many images, and another seed makes others."""
    images = noise(1, 32, 32, 3).expand(64, -1, -1, -1)
    result = augment(images, seeded(0), kind)
    assert len(result.flatten(1).unique(dim=0)) > 40
    assert not torch.equal(result, augment(images, seeded(1), kind))


class Calls(TorchDispatchMode):
    """Counts what is handed to the device, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", KINDS)
def test_work_does_not_grow_with_the_batch(kind: str) -> None:
    """As many calls for 4,000 images as for 1,000; none waits for a number or a list of indices."""
    seen = []
    augment(noise(1, 8, 8, 3), seeded(0), kind)  # the policy's table is made once and kept
    for count in (1_000, 4_000):
        with Calls() as calls:
            augment(torch.zeros(count, 8, 8, 3, dtype=torch.uint8), seeded(0), kind)
        seen.append(calls.names)
    assert seen[0] == seen[1]
    assert not {"_local_scalar_dense", "nonzero", "masked_select"} & set(seen[0])
