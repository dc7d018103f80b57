"""Augmentations of a whole batch of uint8 images `(N, H, W, C)`, on the device where they lie.

H and W are at least 8, C is 1 or 3. The generator lies on the same device; the same state gives the same images.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

Augmentation = Callable[[Tensor, torch.Generator], Tensor]


def crop(images: Tensor, generator: torch.Generator, padding: int) -> Tensor:
    """Each image shifted by up to `padding` pixels in both directions, zeros coming in at the edges."""
    count, height, width, _ = images.shape
    offsets = torch.randint(2 * padding + 1, (2, count, 1), generator=generator, device=images.device)
    if count == 1 and images.device.type == "cpu":  # two slices; pixel by pixel takes as long as decoding a JPEG
        down, right = (int(offset) - padding for offset in offsets)
        moved = torch.zeros_like(images)
        height, width = height - abs(down), width - abs(right)
        kept = images[:, max(0, down) :, max(0, right) :][:, :height, :width]
        moved[:, max(0, -down) :, max(0, -right) :][:, :height, :width] = kept
        return moved
    padded = functional.pad(images, (0, 0, padding, padding, padding, padding))
    rows = offsets[0] + torch.arange(height, device=images.device)
    columns = offsets[1] + torch.arange(width, device=images.device)
    return pick(padded, rows, columns)


def flip(images: Tensor, generator: torch.Generator) -> Tensor:
    """Each image mirrored left to right with probability one half."""
    chosen = torch.rand(len(images), generator=generator, device=images.device) < 0.5
    if len(images) == 1 and images.device.type == "cpu":  # as in `crop`
        return images.flip(2) if chosen.item() else images
    return torch.where(chosen[:, None, None, None], images.flip(2), images)


def pick(images: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Of each image the pixels at its rows `(N, h)` and columns `(N, w)`: `(N, h, w, C)`."""
    count, height, width, channels = images.shape
    first = torch.arange(count, device=images.device)[:, None, None] * (height * width)
    index = first + rows[:, :, None] * width + columns[:, None, :]
    # Whole pixels of a flat list: a crop in 0.5 ms where indexing by image, row and column takes 2.
    return images.reshape(-1, channels).index_select(0, index.flatten()).view(*index.shape, channels)


def box(images: Tensor, top: Tensor, left: Tensor, height: Tensor, width: Tensor) -> Tensor:
    """Which pixels lie in each image's box, `(N, H, W, 1)` bool; its corner and sides are `(N,)` whole pixels."""
    row = torch.arange(images.shape[1], device=images.device) - top[:, None]
    column = torch.arange(images.shape[2], device=images.device) - left[:, None]
    rows, columns = (row >= 0) & (row < height[:, None]), (column >= 0) & (column < width[:, None])
    return (rows[:, :, None] & columns[:, None, :])[..., None]


def below(limit: Tensor, generator: torch.Generator) -> Tensor:
    """A uniform integer from 0 to limit - 1 for each of the limits, which are positive integers."""
    uniform = torch.rand(limit.shape, generator=generator, device=limit.device, dtype=torch.float64)
    return torch.minimum((uniform * limit).long(), limit - 1)  # rounding may carry the product up to the limit


def crop_shift(images: Tensor, generator: torch.Generator, most: int) -> Tensor:
    """CropShift (Li & Spratling 2023): each image loses s lines, s from 0 to `most`, and the rest moves on zeros.

    x of the s lines are columns, the others rows, x uniform in 0..s; what each side loses and where the rest is laid
    down are uniform. `most` is less than the shorter side.
    """
    count, height, width, _ = images.shape
    lines = torch.randint(most + 1, (count,), generator=generator, device=images.device)
    narrower = below(lines + 1, generator)
    lower = lines - narrower
    offsets = torch.stack([lower, narrower, lower, narrower])
    from_row, from_column, to_row, to_column = below(offsets + 1, generator)
    rows = torch.arange(height, device=images.device) + (from_row - to_row)[:, None]
    columns = torch.arange(width, device=images.device) + (from_column - to_column)[:, None]
    moved = pick(images, rows.clamp(0, height - 1), columns.clamp(0, width - 1))
    return moved.masked_fill(~box(images, to_row, to_column, height - lower, width - narrower), 0)


def erase(images: Tensor, generator: torch.Generator, probability: float) -> Tensor:
    """Random Erasing (Zhong et al. 2020): with `probability`, a rectangle of each image is set to zero.

    Its area is 2 to 33 % of the image, its height over width 0.3 to 3.3 on a log scale, the first of ten draws that
    fits: torchvision's defaults, and its distribution.
    """
    count, height, width, _ = images.shape
    share, shape = torch.rand(2, 10, count, generator=generator, device=images.device, dtype=torch.float64)
    area = (0.02 + 0.31 * share) * height * width
    ratio = 0.3 * (3.3 / 0.3) ** shape
    tall, wide = (area * ratio).sqrt().round().long(), (area / ratio).sqrt().round().long()
    fits = (tall < height) & (wide < width)
    first = fits.to(torch.uint8).argmax(dim=0, keepdim=True)
    (tall,), (wide,), (fits,) = tall.gather(0, first), wide.gather(0, first), fits.gather(0, first)
    top, left = below(torch.stack([height - tall, width - wide]).clamp(min=0) + 1, generator)
    chosen = torch.rand(count, generator=generator, device=images.device) < probability
    return images.masked_fill(box(images, top, left, tall * (chosen & fits), wide), 0)


def padcrop(images: Tensor, generator: torch.Generator) -> Tensor:
    """`crop` by an eighth of the side: 4 pixels of 32, as all CIFAR work does."""
    return crop(images, generator, padding=max(1, images.shape[1] // 8))


def autoaugment(images: Tensor, generator: torch.Generator) -> Tensor:
    """Crop, flip, then AutoAugment's CIFAR-10 policy (Cubuk et al. 2019), a sub-policy for each image.

    Operations and magnitudes are those of torchvision's AutoAugment, which draws once for a batch.
    """
    from dfmcl.training import policies  # here, as torchvision takes long to load

    moved = flip(padcrop(images, generator), generator)
    return policies.follow(policies.cifar10_policy(images.shape[1], images.shape[2]), moved, generator)


def idbh(images: Tensor, generator: torch.Generator, erasing: float = 0.5) -> Tensor:
    """Flip, CropShift, one colour or shape operation, Random Erasing with probability `erasing`: IDBH-style.

    Li & Spratling 2023, "Data Augmentation Alone Can Improve Adversarial Training", with the parameters that they
    published for CIFAR-10: `erasing` 0.5 is their weak variant, 1 their strong one. Not theirs to the letter:
    CropShift's 10 pixels of 32 scale with the side, degrees of rotation are no whole numbers, a shear's slope rather
    than its angle is uniform (within 1 %), and operations are torchvision's on tensors where theirs are Pillow's.
    """
    from dfmcl.training import policies

    moved = crop_shift(flip(images, generator), generator, most=10 * min(images.shape[1:3]) // 32)
    return erase(policies.follow(policies.COLOUR_SHAPE, moved, generator), generator, erasing)


AUGMENTATIONS: dict[str, Augmentation] = {
    "none": lambda images, generator: images,
    "crop": padcrop,
    "crop-flip": lambda images, generator: flip(padcrop(images, generator), generator),
    "autoaugment": autoaugment,
    "idbh": idbh,
}


def augment(images: Tensor, generator: torch.Generator, kind: str) -> Tensor:
    """Images `(N, H, W, C)` uint8 changed as AUGMENTATIONS says, each on its own; same shape and type."""
    return AUGMENTATIONS[kind](images, generator)
