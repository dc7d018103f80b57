"""Adversarial images beside their originals, as PNG in data URLs."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from dfmcl.gating.formats.summary import Probes

Pixels = NDArray[np.uint8]
SHOWN = 12
# A page with 36 pictures stays below 2 MB; larger ones are reduced for display.
LARGEST = 128


@dataclass(frozen=True)
class Exhibit:
    """One image that an attack flipped: three data URLs, the true label and the answers before and after."""

    index: int
    original: str
    adversarial: str
    perturbation: str
    label: str
    before: str
    after: str


@dataclass(frozen=True)
class Gallery:
    """amplified: by how much perturbations are multiplied around grey; largest: their greatest step, in 255ths."""

    exhibits: tuple[Exhibit, ...]
    amplified: int
    largest: int
    reduced: bool


def gallery(probes: Probes, index: Sequence[int], classes: Sequence[str]) -> Gallery:
    """The first SHOWN images in the order attacked that were right and are no longer."""
    seen = len(probes["images"])  # whose pixels are there
    before, after = (probes[f"{name}_logits"][:seen].argmax(axis=1) for name in ("clean", "adversarial"))
    labels = probes["labels"][:seen]
    chosen = np.flatnonzero((before == labels) & (after != labels))[:SHOWN]
    adversarial = probes["images"][chosen] + probes["change"][chosen]
    change = adversarial.astype(np.int16) - probes["images"][chosen]
    largest = int(np.abs(change).max(initial=0))
    factor = max(1, 127 // max(largest, 1))
    grey = np.clip(128 + factor * change, 0, 255).astype(np.uint8)
    exhibits = tuple(
        Exhibit(
            index[row],
            _url(probes["images"][row]),
            _url(adversarial[number]),
            _url(grey[number]),
            classes[probes["labels"][row]],
            classes[before[row]],
            classes[after[row]],
        )
        for number, row in enumerate(chosen)
    )
    return Gallery(exhibits, factor, largest, max(probes["images"].shape[1:3]) > LARGEST)


def _url(pixels: Pixels) -> str:
    """uint8 `(H, W, C)` as a PNG; one channel is grey, of other numbers the first three are shown as colours."""
    shown: NDArray[Any] = pixels[..., 0] if pixels.shape[-1] < 3 else pixels[..., :3]
    picture = Image.fromarray(np.ascontiguousarray(shown))
    picture.thumbnail((LARGEST, LARGEST))
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"
