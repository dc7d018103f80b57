"""Contrast, stretching, few pixels, JPEG."""

from __future__ import annotations

from io import BytesIO

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage

from dfmcl.robustness.corruptions.picture import Picture


def contrast(x: Picture, draw: np.random.RandomState, share: float) -> Picture:
    """That share of each channel's distance to its mean."""
    mean = x.mean(axis=(0, 1), keepdims=True)
    flat: Picture = (x - mean) * share + mean
    return flat


def elastic_transform(x: Picture, draw: np.random.RandomState, length: float, smooth: float, affine: float) -> Picture:
    """Stretched by a random affine map and a smooth random field, in one interpolation; shares of the shorter side.

    length: of the field's vectors before smoothing. smooth: of the Gaussian over them. affine: how far each of three
    points may go.
    """
    height, width = x.shape[:2]
    side = min(height, width)
    middle, arm = np.array([height // 2, width // 2], float), side // 3
    before = middle + arm * np.array([[1, 1], [1, -1], [-1, -1]])
    after = before + draw.uniform(-affine * side, affine * side, size=before.shape)
    # From where a point comes: the affine map that brings `after` back to `before`.
    back = np.linalg.solve(np.column_stack([after, np.ones(3)]), before)
    field = [
        ndimage.gaussian_filter(draw.uniform(-1, 1, (height, width)), smooth * side, mode="reflect", truncate=3)
        for _ in range(2)
    ]
    rows, columns = np.mgrid[:height, :width] + length * side * np.array(field)
    places = np.stack([rows, columns, np.ones_like(rows)], axis=2) @ back
    channels = [
        ndimage.map_coordinates(x[..., channel], places.transpose(2, 0, 1), order=1, mode="mirror")
        for channel in range(x.shape[2])
    ]
    found: Picture = np.stack(channels, axis=2)
    return found


def pixelate(x: Picture, draw: np.random.RandomState, share: float) -> Picture:
    """Made smaller to that share of each side, and large again, by the mean over boxes."""
    image, (height, width) = _as_image(x), x.shape[:2]
    small = image.resize((max(1, int(width * share)), max(1, int(height * share))), Image.Resampling.BOX)
    return _of_image(small.resize((width, height), Image.Resampling.BOX), x)


def jpeg_compression(x: Picture, draw: np.random.RandomState, quality: float) -> Picture:
    """Through JPEG of that quality, by Pillow."""
    file = BytesIO()
    _as_image(x).save(file, "JPEG", quality=int(quality))
    with Image.open(file) as image:
        return _of_image(image, x)


def _as_image(x: Picture) -> Image.Image:
    levels: NDArray[np.uint8] = np.rint(x * 255).astype(np.uint8)
    return Image.fromarray(levels[..., 0] if x.shape[2] == 1 else levels)


def _of_image(image: Image.Image, x: Picture) -> Picture:
    return np.asarray(image, np.float64).reshape(x.shape) / 255
