"""The picture of docs/threats.md: one photograph under each threat."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from sklearn.datasets import load_sample_images
from torch import Tensor

from dfmcl.robustness.attacks.patch_rs import patch_rs
from dfmcl.robustness.corruptions.severities import PUBLISHED
from dfmcl.robustness.seeds import generator
from dfmcl.robustness.threats.ball import Ball
from dfmcl.robustness.threats.patch import Patch
from dfmcl.robustness.threats.registry import parse_threat
from dfmcl.robustness.threats.threat import Threat
from dfmcl.robustness.threats.transforms import Transforms

OUT = Path(__file__).parent / "threats.jpg"
SIDE, SHOWN, LINE, COLUMNS = 224, 150, 18, 6
SPELLINGS = (
    *("linf:8/255", "l2:5", "l1:400", "patch:2%", "rotation:30", "shift:10%", "rotation:30+shift:10%,5x5x5,edge"),
    *(f"{name}@3" for name in PUBLISHED),
)


def member(threat: Threat, images: Tensor) -> Tensor:
    """One image of the threat, drawn without a network: uint8 `(1, 3, H, W)` -> the same."""
    x, stream = images.float() / 255, generator(1, threat.spelling)
    if isinstance(threat, Ball):
        moved = threat.to_uint8(threat.start(x, stream), x)
    elif isinstance(threat, Transforms):
        moved = threat.transformed(images, torch.tensor([threat.count((3, SIDE, SIDE)) - 1]))
    else:
        assert isinstance(threat, Patch)
        blind = torch.zeros(1, 2)  # an answer that is the same for all, so that the first draw is returned
        moved = (patch_rs(lambda x: blind, x, torch.tensor([0]), threat, generator=stream, queries=1) * 255).byte()
    assert threat.contains_uint8(moved, images).all(), threat
    return moved


def main() -> None:
    photograph = Image.fromarray(load_sample_images().images[0][60:380, 120:440])
    pixels = np.array(photograph.resize((SIDE, SIDE), Image.Resampling.BOX))
    images = torch.from_numpy(pixels).permute(2, 0, 1)[None].contiguous()
    tiles = [("the image", images)]
    tiles += [(str(threat), member(threat, images)) for threat in map(parse_threat, SPELLINGS)]
    rows = -(-len(tiles) // COLUMNS)
    sheet = Image.new("RGB", (COLUMNS * (SHOWN + 6), rows * (SHOWN + LINE + 4)), "white")
    draw = ImageDraw.Draw(sheet)
    for number, (title, tile) in enumerate(tiles):
        left, top = number % COLUMNS * (SHOWN + 6) + 3, number // COLUMNS * (SHOWN + LINE + 4)
        draw.text((left, top + 3), title, fill="black")
        shown = Image.fromarray(tile[0].permute(1, 2, 0).numpy()).resize((SHOWN, SHOWN), Image.Resampling.LANCZOS)
        sheet.paste(shown, (left, top + LINE))
    sheet.save(OUT, quality=85)
