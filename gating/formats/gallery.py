"""Adversarial images beside their originals, as PNG in data URLs."""

from __future__ import annotations

import base64
import io
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from dfmcl.gating.formats.summary import Probes
from dfmcl.gating.signing.probes_file import further
from dfmcl.gating.signing.report import Report
from dfmcl.robustness.threats.corruption import Corruption

Pixels = NDArray[np.uint8]
SHOWN, BESIDE, SPOILED = 12, 6, 15
# A page with 36 pictures stays below 2 MB, one with three further threats and corruptions below 8; larger ones are
# reduced for display.
LARGEST = 128


@dataclass(frozen=True)
class Exhibit:
    """One image that an attack flipped: three data URLs, the true label and the answers before and after.

    threat: which of the gallery's, where it has several.
    """

    index: int
    original: str
    adversarial: str
    perturbation: str
    label: str
    before: str
    after: str
    threat: str = ""


@dataclass(frozen=True)
class Gallery:
    """Images that fell to one threat, or to corruptions.

    amplified: by how much perturbations are multiplied around grey; largest: their greatest step, in 255ths.
    """

    threat: str
    exhibits: tuple[Exhibit, ...]
    amplified: int
    largest: int
    reduced: bool


@dataclass(frozen=True)
class Flipped:
    """What an attack made of the first images `(Q, H, W, C)`, and the answers `(Q,)` to it. kind: of corruption."""

    threat: str
    kind: str
    adversarial: Pixels
    answers: NDArray[np.int64]


def galleries(probes: Probes, report: Report) -> list[Gallery]:
    """The first images in the order attacked that were right and are no longer: SHOWN in the policy's own threat,
    BESIDE in each further one, and SPOILED by corruptions, which are one. Other radii of the same ball look alike and
    are left out."""
    own = report.evaluation.threat.parsed
    adversarial = probes["images"] + probes["change"]
    main = Flipped(str(own), "", adversarial, probes["adversarial_logits"][: len(adversarial)].argmax(axis=1))
    groups: dict[str, list[Flipped]] = {}
    for one, (changed, logits) in zip(report.radii, further(probes), strict=False):
        threat = one.threat.parsed
        if threat.kind != own.kind:
            kind = threat.corruption if isinstance(threat, Corruption) else ""
            flipped = Flipped(str(threat), kind, changed, logits.argmax(axis=1))
            groups.setdefault("corruptions" if kind else str(threat), []).append(flipped)
    found = [
        _gallery(probes, report, title, same, SPOILED if same[0].kind else BESIDE) for title, same in groups.items()
    ]
    return [_gallery(probes, report, main.threat, [main], SHOWN), *(one for one in found if one.exhibits)]


def _gallery(probes: Probes, report: Report, title: str, flipped: Sequence[Flipped], most: int) -> Gallery:
    index, classes = report.per_image.index, report.data.classes
    clean = probes["clean_logits"].argmax(axis=1)
    right = clean == probes["labels"]
    # The first of each kind, then the second of each: no kind fills the wall.
    rows = [np.flatnonzero(right[: len(one.answers)] & (one.answers != clean[: len(one.answers)])) for one in flipped]
    turns = sorted((turn, place, int(row)) for place, mine in enumerate(rows) for turn, row in enumerate(mine))
    shown = Counter[str]()
    ranked = []
    for number, (_, place, row) in enumerate(turns):
        ranked.append((shown[flipped[place].kind], number, place, row))
        shown[flipped[place].kind] += 1
    chosen = [(flipped[place], row) for _, _, place, row in sorted(ranked)[:most]]
    changes = [one.adversarial[row].astype(np.int16) - probes["images"][row] for one, row in chosen]
    largest = max((int(np.abs(change).max(initial=0)) for change in changes), default=0)
    factor = max(1, 127 // max(largest, 1))
    exhibits = tuple(
        Exhibit(
            index[row],
            _url(probes["images"][row]),
            _url(one.adversarial[row]),
            _url(np.clip(128 + factor * change, 0, 255).astype(np.uint8)),
            classes[probes["labels"][row]],
            classes[clean[row]],
            classes[one.answers[row]],
            one.threat if len(flipped) > 1 else "",
        )
        for (one, row), change in zip(chosen, changes, strict=True)
    )
    return Gallery(title, exhibits, factor, largest, max(probes["images"].shape[1:3]) > LARGEST)


def _url(pixels: Pixels) -> str:
    """uint8 `(H, W, C)` as a PNG; one channel is grey, of other numbers the first three are shown as colours."""
    shown: NDArray[Any] = pixels[..., 0] if pixels.shape[-1] < 3 else pixels[..., :3]
    picture = Image.fromarray(np.ascontiguousarray(shown))
    picture.thumbnail((LARGEST, LARGEST))
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"
