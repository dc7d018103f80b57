"""All corruptions, and a picture under one of them."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from hashlib import sha256

import numpy as np
from numpy.typing import NDArray

from dfmcl.robustness.corruptions import blur, digital, noise, weather
from dfmcl.robustness.corruptions.picture import Picture
from dfmcl.robustness.corruptions.severities import PUBLISHED

CORRUPTIONS: dict[str, Callable[..., Picture]] = {
    "gaussian_noise": noise.gaussian_noise,
    "shot_noise": noise.shot_noise,
    "impulse_noise": noise.impulse_noise,
    "defocus_blur": blur.defocus_blur,
    "glass_blur": blur.glass_blur,
    "motion_blur": blur.motion_blur,
    "zoom_blur": blur.zoom_blur,
    "snow": weather.snow,
    "frost": weather.frost,
    "fog": weather.fog,
    "brightness": weather.brightness,
    "contrast": digital.contrast,
    "elastic_transform": digital.elastic_transform,
    "pixelate": digital.pixelate,
    "jpeg_compression": digital.jpeg_compression,
}
RECENT = 256  # pictures: a batch is replayed to judge it right after it was made


def corrupted(image: NDArray[np.uint8], corruption: str, severity: int) -> NDArray[np.uint8]:
    """uint8 `(H, W, C)`, C 1 or 3, under a corruption at a severity from 1 to 5; the same bytes whenever it is asked.

    Its draws are seeded by the corruption and the picture's own bytes; all severities share them, so that a higher one
    is more of the same. numpy keeps the stream of RandomState; scipy, Pillow and libjpeg may round otherwise in another
    version.
    """
    data = _corrupted(np.ascontiguousarray(image).tobytes(), image.shape, corruption, severity)
    return np.frombuffer(data, np.uint8).reshape(image.shape)


@lru_cache(RECENT)
def _corrupted(data: bytes, shape: tuple[int, ...], corruption: str, severity: int) -> bytes:
    seed = np.frombuffer(sha256(corruption.encode() + data).digest(), np.uint32)
    x = np.frombuffer(data, np.uint8).reshape(shape) / 255
    given = PUBLISHED[corruption].of(min(shape[:2]), severity)
    found = CORRUPTIONS[corruption](x, np.random.RandomState(seed), *given)
    return np.rint(np.clip(found, 0, 1) * 255).astype(np.uint8).tobytes()
