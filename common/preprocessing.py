"""How an upright picture of any size becomes one of a network's size: the same pixels in training, gate and gateway."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dfmcl.common.errors import BadInput

if TYPE_CHECKING:
    from PIL import Image

PARAMETER = "preprocessing"  # of a model's configuration in Triton
FILTERS = ("bilinear", "bicubic", "lanczos", "hamming", "box", "nearest")
FIT, SQUASH = "fit", "squash"
LONGEST = 16  # times its shorter side: of what is longer the middle is resized
WORDS = f"'{FIT}', '{SQUASH}' or 'resize=256', with a filter: {', '.join(FILTERS)}"


@dataclass(frozen=True)
class Preprocessing:
    """One of three rules, and Pillow's filter.

    resize: the side in pixels that the shorter side is brought to before the middle is cut out, as torchvision and timm
    evaluate (`resize=256` for 224); 0: as large as the picture's shape allows. squash: both sides are brought to the
    network's, whatever the picture's shape.
    """

    resize: int = 0
    squash: bool = False
    filter: str = "bilinear"

    @staticmethod
    def parse(text: str) -> Preprocessing:
        """From words such as `resize=256 bicubic`; none: `fit bilinear`. ValueError for other words."""
        words = text.split()
        filters = [word for word in words if word in FILTERS]
        rules = [word for word in words if word in (FIT, SQUASH) or re.fullmatch(r"resize=[1-9]\d{0,4}", word)]
        if len(filters) > 1 or len(rules) > 1 or len(filters) + len(rules) < len(words):
            raise ValueError(f"{text!r} is no preprocessing; expected {WORDS}")
        rule = rules[0] if rules else FIT
        side = int(rule.partition("=")[2] or 0)
        return Preprocessing(side, rule == SQUASH, filters[0] if filters else "bilinear")

    def __str__(self) -> str:
        """The words that `parse` reads, all of them."""
        rule = SQUASH if self.squash else f"resize={self.resize}" if self.resize else FIT
        return f"{rule} {self.filter}"

    def require_side(self, side: int) -> None:
        """BadInput where a network of this side takes more than the resized picture has."""
        if 0 < self.resize < side:
            raise BadInput(
                f"preprocessing {self}: is smaller than the network's {side} pixels; resize to {side} or more"
            )

    def applied(self, image: Image.Image, width: int, height: int) -> Image.Image:
        """The picture at this size."""
        from PIL import Image, ImageOps  # only a room that has pictures has Pillow

        by = Image.Resampling[self.filter.upper()]
        if self.squash:
            return image if image.size == (width, height) else image.resize((width, height), by)
        if not self.resize:
            return image if image.size == (width, height) else ImageOps.fit(image, (width, height), by)
        shorter = min(image.size)
        if max(image.size) > LONGEST * shorter:  # a strip, which resized whole would fill the memory
            width_kept, height_kept = (min(side, LONGEST * shorter) for side in image.size)
            image = ImageOps.fit(image, (width_kept, height_kept), by)
        # torchvision's arithmetic: Resize(R), then CenterCrop.
        size = tuple(self.resize if side == shorter else self.resize * side // shorter for side in image.size)
        resized = image if shorter == self.resize else image.resize((size[0], size[1]), by)
        left, top = (round((had - wanted) / 2) for had, wanted in zip(resized.size, (width, height), strict=True))
        return resized.crop((left, top, left + width, top + height))


USUAL = Preprocessing()
