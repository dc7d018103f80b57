"""What several corruptions do to a picture: filters, zoom, plasma. Pictures are float64 `(H, W, C)` in [0, 1]."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage, signal

Picture = NDArray[np.float64]


def filtered(x: Picture, kernel: NDArray[np.float64], mode: Any) -> Picture:
    """Correlation of each channel with a kernel of odd sides; mode: how numpy pads."""
    rows, columns = (side // 2 for side in kernel.shape)
    padded = np.pad(x, ((rows, rows), (columns, columns), (0, 0)), mode=mode)
    found: Picture = signal.fftconvolve(padded, kernel[::-1, ::-1, None], mode="valid", axes=(0, 1))
    return found


def smoothed(x: Picture, sigma: float) -> Picture:
    """Under a Gaussian of that many pixels."""
    found: Picture = ndimage.gaussian_filter(x, (sigma, sigma, 0), mode="nearest")
    return found


def streaked(x: Picture, radius: float, sigma: float, degrees: float) -> Picture:
    """As of a camera that moved: half a Gaussian of 2 radius + 1 steps of a pixel, in one direction."""
    steps = np.arange(2 * math.ceil(radius) + 1)
    weights = np.exp(-(steps**2) / (2 * sigma**2))
    reach = len(steps) - 1
    kernel = np.zeros((2 * reach + 1, 2 * reach + 1))
    angle = math.radians(degrees)
    places = [np.rint(reach + turn * steps).astype(int) for turn in (math.sin(angle), math.cos(angle))]
    np.add.at(kernel, (places[0], places[1]), weights / weights.sum())
    return filtered(x, kernel, "edge")


def zoomed(x: Picture, factor: float) -> Picture:
    """The middle of the picture, enlarged to the whole; bilinear."""
    middle = (np.array(x.shape[:2]) - 1) / 2
    offset = middle - middle / factor
    channels = [
        ndimage.affine_transform(x[..., channel], [1 / factor, 1 / factor], offset, order=1, mode="nearest")
        for channel in range(x.shape[2])
    ]
    found: Picture = np.stack(channels, axis=2)
    return found


def plasma(shape: tuple[int, ...], decay: float, draw: np.random.RandomState) -> NDArray[np.float64]:
    """Clouds in [0, 1] `(H, W)` for a picture `(H, W, ...)`: midpoint displacement on a torus.

    Each octave is weaker by decay squared.
    """
    field, strength = np.zeros((1, 1)), 1.0
    while len(field) < max(shape[:2]):
        finer = np.zeros((2 * len(field), 2 * len(field)))
        corners = field + np.roll(field, -1, axis=0)
        corners = corners + np.roll(corners, -1, axis=1)
        centres = corners / 4 + draw.uniform(-strength, strength, field.shape)
        finer[::2, ::2], finer[1::2, 1::2] = field, centres
        for axis, place in (
            (0, (slice(1, None, 2), slice(None, None, 2))),
            (1, (slice(None, None, 2), slice(1, None, 2))),
        ):
            # A point between two old ones along an axis has two new ones across it.
            around = field + np.roll(field, -1, axis=axis) + centres + np.roll(centres, 1, axis=1 - axis)
            finer[place] = around / 4 + draw.uniform(-strength, strength, field.shape)
        field, strength = finer, strength / decay**2
    cut = field - field.min()
    clouds: NDArray[np.float64] = (cut / cut.max())[: shape[0], : shape[1]]
    return clouds
