"""Odd files as they come from cameras, editors and the web: bytes by name, drawn from one picture."""

from __future__ import annotations

import io
import struct
import zlib
from typing import Any

import numpy as np
from PIL import Image

Array = np.ndarray[Any, np.dtype[np.uint8]]
WIDTH, HEIGHT = 36, 20
ORIENTATION = 0x0112  # EXIF's tag
# What each orientation does to the stored (H, W, C) so that it is upright, by EXIF 2.32, 4.6.4.
TURNED = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
    8: lambda a: np.rot90(a, 1),
}


def drawn(height: int = HEIGHT, width: int = WIDTH, channels: int = 3) -> Array:
    """A smooth picture (H, W, C) without any symmetry, so that a turn, a shift or a squeeze shows."""
    y, x = np.mgrid[0:height, 0:width]
    waves = [128 + 100 * np.sin(x / (3 + c) + c) * np.cos(y / (2 + c)) + x - y for c in range(channels)]
    return np.clip(np.stack(waves, axis=-1), 0, 255).astype(np.uint8)


def saved(picture: Image.Image, kind: str, **options: Any) -> bytes:
    """A picture as a file's bytes; WebP without loss."""
    file = io.BytesIO()
    picture.save(file, kind, **({"lossless": True} if kind == "WEBP" else {}), **options)
    return file.getvalue()


def oriented(orientation: int, kind: str = "PNG") -> bytes:
    """The drawn picture with that entry in its EXIF."""
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    return saved(Image.fromarray(drawn()), kind, exif=exif.tobytes())


def chunk(kind: bytes, data: bytes) -> bytes:
    """Of a PNG."""
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, depth: int, colour: int, rows: bytes) -> bytes:
    """A PNG with any header, also one that Pillow would not write. colour: 0 grey, 2 RGB, 6 RGBA."""
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    parts = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + parts


def coloured(colour: int) -> bytes:
    """A PNG of one colour, 20 by 18."""
    return saved(Image.new("RGB", (20, 18), (colour, 255 - colour, 7)), "PNG")


def deep(colour: int, channels: int) -> bytes:
    """A PNG of 16 bits a channel."""
    rows = np.full((HEIGHT, WIDTH * channels), 40_000, ">u2")
    return png(WIDTH, HEIGHT, 16, colour, b"".join(b"\0" + row.tobytes() for row in rows))


def readable() -> dict[str, bytes]:
    """What becomes an image, in the formats that training and gateway share."""
    rgb = Image.fromarray(drawn())
    rgba, grey = Image.fromarray(drawn(channels=4)), rgb.convert("L")
    palette = rgb.quantize(8)
    return {
        **{f"EXIF {k} {kind}": oriented(k, kind) for k in TURNED for kind in ("PNG", "JPEG", "WEBP")},
        "RGB": saved(rgb, "PNG"),
        "RGBA": saved(rgba, "PNG"),
        "RGBA WebP": saved(rgba, "WEBP"),
        "RGB with one transparent colour": saved(rgb, "PNG", transparency=rgb.getpixel((0, 0))),
        "grey": saved(grey, "PNG"),
        "grey with alpha": saved(rgba.convert("LA"), "PNG"),
        "grey with one transparent level": saved(grey, "PNG", transparency=grey.getpixel((0, 0))),
        "black and white": saved(rgb.convert("1"), "PNG"),
        "palette": saved(palette, "PNG"),
        "palette with transparency": saved(palette, "PNG", transparency=0),
        "palette with alpha": saved(palette, "PNG", transparency=bytes(range(0, 256, 32))),
        "JPEG": saved(rgb, "JPEG"),
        "progressive JPEG": saved(rgb, "JPEG", progressive=True),
        "CMYK JPEG": saved(rgb.convert("CMYK"), "JPEG"),
        "grey JPEG": saved(grey, "JPEG"),
        "a camera's JPEG with a preview": saved(rgb, "MPO", save_all=True, append_images=[rgb.resize((9, 5))]),
        "WebP": saved(rgb, "WEBP"),
        "wide": saved(Image.fromarray(drawn(9, 91)), "PNG"),
        "tall": saved(Image.fromarray(drawn(91, 9)), "PNG"),
        "one row": saved(Image.fromarray(drawn(1, 4000)), "PNG"),
        "one pixel": saved(Image.fromarray(drawn(1, 1)), "PNG"),
    }


def unreadable() -> dict[str, tuple[bytes, str]]:
    """What becomes none, in these formats, and why."""
    rgb = Image.fromarray(drawn())
    more = {"save_all": True, "append_images": [rgb.rotate(180)]}
    cut = "is cut off or broken"
    return {
        "16-bit grey": (deep(0, 1), "more than 8 bits a channel; save it with 8"),
        "16-bit RGB": (deep(2, 3), "more than 8 bits a channel; save it with 8"),
        "16-bit RGBA": (deep(6, 4), "more than 8 bits a channel; save it with 8"),
        "animated PNG": (saved(rgb, "PNG", **more), "has 2 frames or pages; save one of them"),
        "animated WebP": (saved(rgb, "WEBP", **more), "has 2 frames or pages; save one of them"),
        "truncated PNG": (saved(rgb, "PNG")[:-200], cut),
        "truncated JPEG": (saved(rgb, "JPEG")[:-100], cut),
        "truncated WebP": (saved(rgb, "WEBP")[:-100], "is "),  # told when it is opened, or later: libwebp's choice
        "HTML": (b"<!doctype html><title>404 Not Found</title>", "is no readable "),
        "empty": (b"", "is no readable "),
        "a bomb": (png(20_000, 20_000, 8, 2, b"\0" * 1000), "may have up to "),
        "a bomb below Pillow's own bound": (png(12_000, 12_000, 8, 2, b"\0" * 1000), "has 12000 x 12000 pixels, may"),
    }


def other() -> dict[str, bytes]:
    """Files of one picture that only training reads, by suffix."""
    rgb = Image.fromarray(drawn())
    kinds = {"gif": "GIF", "bmp": "BMP", "tif": "TIFF", "TIFF": "TIFF", "ppm": "PPM", "jp2": "JPEG2000"}
    return {suffix: saved(rgb, kind) for suffix, kind in kinds.items()}
