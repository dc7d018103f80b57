"""Blur of lenses, of frosted glass and of motion."""

from __future__ import annotations

import math

import numpy as np
from scipy import ndimage

from dfmcl.robustness.corruptions.picture import Picture, filtered, smoothed, streaked, zoomed


def defocus_blur(x: Picture, draw: np.random.RandomState, radius: float, alias: float) -> Picture:
    """A disk of that many pixels, its border softened by a Gaussian."""
    soft = 1 if radius <= 8 else 2  # pixels that the Gaussian is cut at
    reach = math.ceil(radius) + soft
    place = np.arange(-reach, reach + 1)
    disk = (place[:, None] ** 2 + place**2 <= radius**2).astype(np.float64)
    disk = ndimage.gaussian_filter(disk, alias, radius=soft, mode="constant")
    return filtered(x, disk / disk.sum(), "reflect")


def glass_blur(x: Picture, draw: np.random.RandomState, sigma: float, reach: float, rounds: float) -> Picture:
    """Blurred, each pixel replaced by one up to `reach` pixels away, from the last to the first, and blurred again.

    The paper speaks of swaps; the benchmark's images are of replacements, as these are.
    """
    height, width = x.shape[:2]
    far = min(int(reach), (min(height, width) - 1) // 2)
    blurred = np.floor(smoothed(x, sigma) * 255) / 255
    rows, columns = np.arange(height - far, far, -1), np.arange(width - far, far, -1)
    here = (rows[:, None] * width + columns).ravel()
    order = list(range(height * width))
    for _ in range(int(rounds)):
        right, down = draw.randint(-far, far, size=(2, len(here)))
        # On a list of places: a pixel takes what the ones before it left, so they cannot be done at once.
        for one, other in zip(here.tolist(), (here + down * width + right).tolist(), strict=True):
            order[one] = order[other]
    return smoothed(blurred.reshape(height * width, -1)[order].reshape(x.shape), sigma)


def motion_blur(x: Picture, draw: np.random.RandomState, radius: float, sigma: float) -> Picture:
    """Along a line within 45 degrees of the horizontal."""
    return streaked(x, radius, sigma, draw.uniform(-45, 45))


def zoom_blur(x: Picture, draw: np.random.RandomState, end: float, step: float) -> Picture:
    """The mean of the picture and of enlargements from 1 to below `end`."""
    factors = np.arange(1, end, step)
    return (x + sum(zoomed(x, float(factor)) for factor in factors)) / (len(factors) + 1)
