"""Augmentation policies: which operation changes which image, and by how much, for a whole batch at once.

A policy is a tuple of equally likely sub-policies, a sub-policy a tuple of steps. Every image draws its own
sub-policy, and for each step whether it happens and its magnitude. `OPERATIONS` do the work on groups of images
`(n, C, H, W)` uint8, C 1 or 3, with one magnitude an image, `(n,)` float64; each does to an image, on a CPU to the
bit, what torchvision's function of that name does to it alone (nearest neighbour, zeros coming in at the edges).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import astuple, dataclass
from functools import lru_cache, partial

import torch
from torch import Tensor
from torch.nn import functional
from torchvision.transforms.v2 import functional as vision

Operation = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Step:
    """With `probability`, the operation with magnitude centre ± U(low, high), both signs equally likely."""

    operation: str
    probability: float = 1.0
    centre: float = 0.0
    low: float = 0.0
    high: float = 0.0


Policy = tuple[tuple[Step, ...], ...]


def per_image(magnitude: Tensor) -> Tensor:
    """`(n,)` as float32 `(n, 1, 1, 1)`, to meet images."""
    return magnitude.to(torch.float32)[:, None, None, None]


def blend(images: Tensor, other: Tensor, factor: Tensor) -> Tensor:
    """factor * images + (1 - factor) * other, cut to [0, 255]: 0 gives the other, 1 the images, 2 overshoots."""
    # addcmul multiplies and adds in one rounding, as torchvision's blend does: the same bits after truncation.
    mixed = torch.addcmul(images * per_image(factor), other.to(torch.float32), per_image(1 - factor))
    return mixed.clamp_(0, 255).to(torch.uint8)


def saturation(images: Tensor, factor: Tensor) -> Tensor:
    """Towards (factor < 1) or away from grey, which a single channel already is."""
    return images if images.shape[1] == 1 else blend(images, vision.rgb_to_grayscale(images), factor)


def brightness(images: Tensor, factor: Tensor) -> Tensor:
    """factor times the image."""
    return (images * per_image(factor)).clamp_(0, 255).to(torch.uint8)


def contrast(images: Tensor, factor: Tensor) -> Tensor:
    """Towards or away from the image's mean grey."""
    grey = vision.rgb_to_grayscale(images).to(torch.float32).mean((1, 2, 3), keepdim=True)
    return blend(images, grey, factor)


def sharpness(images: Tensor, factor: Tensor) -> Tensor:
    """Towards or away from the image smoothed by ((1, 1, 1), (1, 5, 1), (1, 1, 1)) / 13; its border stays."""
    inner = images[:, :, 1:-1, 1:-1].to(torch.float32)
    total = functional.avg_pool2d(images.to(torch.float32), 3, stride=1, divisor_override=1) + 4 * inner
    smooth = (total / 13).round_()
    sharpened = torch.addcmul(inner, smooth - inner, per_image(1 - factor)).clamp_(0, 255).to(torch.uint8)
    result = images.clone()
    result[:, :, 1:-1, 1:-1] = sharpened
    return result


def posterize(images: Tensor, bits: Tensor) -> Tensor:
    """The upper `bits` (1 to 8) of every byte."""
    return images & (256 - 2 ** (8 - per_image(bits))).to(torch.uint8)


def solarize(images: Tensor, threshold: Tensor) -> Tensor:
    """Values from `threshold` (0 to 255) upwards inverted."""
    return torch.where(images >= per_image(threshold), 255 - images, images)


def autocontrast(images: Tensor, _: Tensor) -> Tensor:
    """Each channel stretched to [0, 255]."""
    return torch.as_tensor(vision.autocontrast(images))


def equalize(images: Tensor, _: Tensor) -> Tensor:
    """Each channel's histogram flattened."""
    return torch.as_tensor(vision.equalize(images))


def invert(images: Tensor, _: Tensor) -> Tensor:
    """255 minus the image."""
    return 255 - images


def warp(images: Tensor, source: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]) -> Tensor:
    """Each pixel taken from where `source` points, both counted from the image's centre.

    source: x `(W,)`, to the right, and y `(H, 1)`, down, to the columns and rows to read, `(n, H, W)` together.
    """
    count, channels, height, width = images.shape
    x = torch.arange(width, device=images.device, dtype=torch.float64) - (width - 1) / 2
    y = torch.arange(height, device=images.device, dtype=torch.float64)[:, None] - (height - 1) / 2
    across, down = source(x, y)
    column = (across + (width - 1) / 2).round().long()
    row = (down + (height - 1) / 2).round().long()
    inside = (column >= 0) & (column < width) & (row >= 0) & (row < height)
    index = torch.where(inside, row * width + column, 0).view(count, 1, -1).expand(-1, channels, -1)
    return images.flatten(2).gather(2, index).view(images.shape).masked_fill(~inside[:, None], 0)


def shear_x(images: Tensor, slope: Tensor, about_corner: bool) -> Tensor:
    """Rows moved to the left by slope times their distance from the top edge, or from the middle."""
    slope = slope[:, None, None]
    origin = images.shape[2] / 2 if about_corner else 0.0
    return warp(images, lambda x, y: (x + slope * (y + origin), y))


def shear_y(images: Tensor, slope: Tensor, about_corner: bool) -> Tensor:
    """Columns moved up by slope times their distance from the left edge, or from the middle."""
    return shear_x(images.mT, slope, about_corner).mT


def translate_x(images: Tensor, pixels: Tensor) -> Tensor:
    """To the right by whole pixels."""
    pixels = pixels.trunc()[:, None, None]
    return warp(images, lambda x, y: (x - pixels, y))


def translate_y(images: Tensor, pixels: Tensor) -> Tensor:
    """Down by whole pixels."""
    return translate_x(images.mT, pixels).mT


def rotate(images: Tensor, degrees: Tensor) -> Tensor:
    """Counter-clockwise about the centre."""
    angle = torch.deg2rad(degrees)[:, None, None]
    cos, sin = angle.cos(), angle.sin()
    return warp(images, lambda x, y: (cos * x - sin * y, sin * x + cos * y))


OPERATIONS: dict[str, Operation] = {
    "shear-y": partial(shear_y, about_corner=True),
    "shear-x-centred": partial(shear_x, about_corner=False),
    "shear-y-centred": partial(shear_y, about_corner=False),
    "translate-x": translate_x,
    "translate-y": translate_y,
    "rotate": rotate,
    "brightness": brightness,
    "saturation": saturation,
    "contrast": contrast,
    "sharpness": sharpness,
    "posterize": posterize,
    "solarize": solarize,
    "autocontrast": autocontrast,
    "equalize": equalize,
    "invert": invert,
}
NAMES = tuple(OPERATIONS)

# Operation, probability and level of the 25 sub-policies found on CIFAR-10: Cubuk et al. 2019, "AutoAugment: Learning
# Augmentation Strategies from Data", table 7 (its Color is the saturation here). No level where there is no magnitude.
CIFAR10 = """
invert       0.1 -  contrast     0.2 6
rotate       0.7 2  translate-x  0.3 9
sharpness    0.8 1  sharpness    0.9 3
shear-y      0.5 8  translate-y  0.7 9
autocontrast 0.5 -  equalize     0.9 -
shear-y      0.2 7  posterize    0.3 7
saturation   0.4 3  brightness   0.6 7
sharpness    0.3 9  brightness   0.7 9
equalize     0.6 -  equalize     0.5 -
contrast     0.6 7  sharpness    0.6 5
saturation   0.7 7  translate-x  0.5 8
equalize     0.3 -  autocontrast 0.4 -
translate-y  0.4 3  sharpness    0.2 6
brightness   0.9 6  saturation   0.2 8
solarize     0.5 2  invert       0.0 -
equalize     0.2 -  autocontrast 0.6 -
equalize     0.2 -  equalize     0.6 -
saturation   0.9 9  equalize     0.6 -
autocontrast 0.8 -  solarize     0.2 8
brightness   0.1 3  saturation   0.7 0
solarize     0.4 5  autocontrast 0.9 -
translate-y  0.9 9  translate-y  0.7 9
autocontrast 0.9 -  solarize     0.8 3
equalize     0.8 -  invert       0.1 -
translate-y  0.7 9  autocontrast 0.9 -
"""


def leveled(operation: str, probability: float, level: int, height: int, width: int) -> Step:
    """The step that a level from 0 to 9 stands for on images of this size, with torchvision's ranges."""
    if operation == "posterize":
        return Step(operation, probability, centre=8 - round(4 * level / 9))
    if operation == "solarize":
        return Step(operation, probability, centre=255 * (1 - level / 9))
    factor = operation in ("brightness", "saturation", "contrast", "sharpness")
    ranges = {"shear-y": 0.3, "rotate": 30.0, "translate-x": 150 / 331 * width, "translate-y": 150 / 331 * height}
    most = 0.9 if factor else ranges.get(operation, 0.0)
    # float32, as in torchvision: 1 - 0.6 is then a little less than 0.4, and a product that was whole is cut to less.
    size = torch.linspace(0, most, 10)[level].item()
    return Step(operation, probability, float(factor), size, size)


@lru_cache
def cifar10_policy(height: int, width: int) -> Policy:
    """AutoAugment's policy for CIFAR-10, for images of this size: 25 sub-policies of two steps."""
    rows = [line.split() for line in CIFAR10.split("\n") if line]
    steps = [
        leveled(operation, float(probability), 0 if level == "-" else int(level), height, width)
        for row in rows
        for operation, probability, level in (row[:3], row[3:])
    ]
    return tuple(zip(steps[::2], steps[1::2], strict=True))


# The "colour" set of IDBH as its authors published it for CIFAR-10 (see augmentation.idbh): one of eight operations,
# equally likely, the last of them a shear along either axis.
COLOUR_SHAPE: Policy = tuple(
    (step,)
    for sixteenths, step in (
        (2, Step("saturation", centre=1.0, high=0.9)),
        (2, Step("brightness", centre=1.2, high=0.7)),
        (2, Step("contrast", centre=1.2, high=0.7)),
        (2, Step("sharpness", centre=1.0, high=0.9)),
        (2, Step("autocontrast")),
        (2, Step("equalize")),
        (2, Step("rotate", low=1.0, high=10.0)),
        (1, Step("shear-x-centred", low=0.05, high=0.15)),
        (1, Step("shear-y-centred", low=0.05, high=0.15)),
    )
    for _ in range(sixteenths)
)


@lru_cache
def table(policy: Policy, device: torch.device) -> Tensor:
    """The policy as numbers `(sub-policies, steps, 5)` float64: index in NAMES, then a Step's other fields."""
    rows = [[[NAMES.index(step.operation), *astuple(step)[1:]] for step in steps] for steps in policy]
    return torch.tensor(rows, dtype=torch.float64, device=device)


def draw(policy: Policy, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """For each step and image, `(steps, count)`: an index in NAMES, or len(NAMES) for nothing; and a magnitude."""
    device = generator.device
    chosen = torch.randint(len(policy), (count,), generator=generator, device=device)
    index, probability, centre, low, high = table(policy, device)[chosen].permute(2, 1, 0)
    happens, size, sign = torch.rand(3, *index.shape, generator=generator, device=device, dtype=torch.float64)
    spread = low + (high - low) * size
    operations = torch.where(happens < probability, index, len(NAMES)).long()
    return operations, centre + torch.where(sign < 0.5, -spread, spread)


def apply(images: Tensor, operations: Tensor, magnitudes: Tensor) -> Tensor:
    """What was drawn done to images `(N, H, W, C)` uint8, one step after the other.

    Images with the same operation go through it together. How many they are is all that the host must know: it waits
    for the device once a batch.
    """
    result = images.permute(0, 3, 1, 2).clone(memory_format=torch.contiguous_format)
    kinds = torch.arange(len(NAMES) + 1, device=images.device)
    counts = (operations[:, :, None] == kinds).sum(1).tolist()
    for sizes, order, magnitude in zip(counts, operations.argsort(dim=1, stable=True), magnitudes, strict=True):
        for name, group in zip((*NAMES, None), order.split(sizes), strict=True):
            if name is not None and len(group):
                result[group] = OPERATIONS[name](result[group], magnitude[group])
    return result.permute(0, 2, 3, 1).contiguous()


def follow(policy: Policy, images: Tensor, generator: torch.Generator) -> Tensor:
    """Every image `(H, W, C)` of the batch changed by a sub-policy of its own."""
    return apply(images, *draw(policy, len(images), generator))
