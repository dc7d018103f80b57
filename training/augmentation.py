"""Augmentations of a whole batch of uint8 images `(N, H, W, C)`, on the device where they lie."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def crop(images: Tensor, generator: torch.Generator, padding: int) -> Tensor:
    """Each image shifted by up to `padding` pixels in both directions, zeros coming in at the edges."""
    count, height, width, _ = images.shape
    padded = functional.pad(images, (0, 0, padding, padding, padding, padding))
    offsets = torch.randint(2 * padding + 1, (2, count, 1), generator=generator, device=images.device)
    rows = offsets[0] + torch.arange(height, device=images.device)
    columns = offsets[1] + torch.arange(width, device=images.device)
    image = torch.arange(count, device=images.device)[:, None, None]
    return padded[image, rows[:, :, None], columns[:, None, :]]


def flip(images: Tensor, generator: torch.Generator) -> Tensor:
    """Each image mirrored left to right with probability one half."""
    chosen = torch.rand(len(images), generator=generator, device=images.device) < 0.5
    return torch.where(chosen[:, None, None, None], images.flip(2), images)


def augment(images: Tensor, generator: torch.Generator, kind: str) -> Tensor:
    """`none`, `crop` (an eighth of the side, 4 pixels of 32, as all CIFAR work does) or `crop-flip`."""
    if kind == "none":
        return images
    moved = crop(images, generator, padding=max(1, images.shape[1] // 8))
    return flip(moved, generator) if kind == "crop-flip" else moved
