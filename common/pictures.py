"""A picture's file as the image that a network is shown: the same pixels, or the same refusal, in training and gateway.

An image is upright as EXIF says, its alpha lies on white, and it has 8 bits a channel; dfmcl.common.preprocessing
brings it to a size. No torch, because the gateway loads this too.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

WHITE = "white"
# Modes of Pillow that become RGB without a loss that nobody asked for; LAB and HSV need a colour profile.
MODES = frozenset({"1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr"})
DEEP = (";16B", ";16L", ";16N")  # in the name that Pillow gives pixels of 16 bits a channel before it halves them

warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)  # `opened` has a bound of its own


class Unusable(Exception):
    """A file that becomes no image. reason: bad_image (no such file), too_large, or wrong_input (not what we take)."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


def opened(file: BinaryIO, formats: tuple[str, ...], max_pixels: int) -> Image.Image:
    """A picture whose header alone was read. formats: Pillow's names. Unusable where it becomes no image."""
    unreadable = f"is no readable {' or '.join(formats)} file"
    with _told(unreadable, max_pixels):
        picture = Image.open(file, formats=formats)
    width, height = picture.size
    if width * height > max_pixels:
        raise Unusable("too_large", f"has {width} x {height} pixels, may have up to {max_pixels}")
    with _told(unreadable, max_pixels):
        frames = _frames(picture)
    if frames > 1:
        raise Unusable("wrong_input", f"has {frames} frames or pages; save one of them")
    if picture.mode.startswith(("I", "F")) or any(_is_deep(tile[0], tile[3]) for tile in picture.tile):
        raise Unusable("wrong_input", "has more than 8 bits a channel; save it with 8")
    if picture.mode not in MODES:
        raise Unusable("wrong_input", f"has colours of mode {picture.mode}; save it as RGB")
    return picture


def _is_deep(codec: str, arguments: object) -> bool:
    """Whether a part of a file has more than 8 bits a channel. arguments: of Pillow's decoder."""
    if codec.startswith("ppm"):  # mode and largest value
        return isinstance(arguments, tuple) and arguments[-1] > 255
    return any(deep in str(arguments) for deep in DEEP)


def upright(picture: Image.Image, mode: str) -> Image.Image:
    """An opened picture, decoded, as EXIF turns it, on white, in mode RGB or L. Unusable where it is cut off."""
    with _told("is cut off or broken"):
        picture.load()
        ImageOps.exif_transpose(picture, in_place=True)
        picture = _on_white(picture) if picture.has_transparency_data else picture
        return picture if picture.mode == mode else picture.convert(mode)


def to_array(image: Image.Image) -> NDArray[np.uint8]:
    """uint8 (H, W, C)."""
    return np.asarray(image, np.uint8).reshape(image.height, image.width, -1)


@contextmanager
def _told(broken: str, max_pixels: int = 0) -> Iterator[None]:
    """Whatever a decoder trips over inside is told as Unusable; memory that ran out is no fault of the file."""
    try:
        yield
    except MemoryError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):  # the latter under python -W error
        raise Unusable("too_large", f"may have up to {max_pixels} pixels") from None
    except Exception:  # noqa: BLE001  # a decoder may trip over a stranger's bytes in any way
        raise Unusable("bad_image", broken) from None


def _frames(picture: Image.Image) -> int:
    """How many pictures the file holds; a camera's JPEG (MPO) has previews and depth maps besides the first."""
    return 1 if picture.format == "MPO" else getattr(picture, "n_frames", 1)


def _on_white(picture: Image.Image) -> Image.Image:
    above = picture.convert("RGBA")
    below = Image.new("RGBA", above.size, WHITE)
    below.alpha_composite(above)
    return below.convert("RGB")
