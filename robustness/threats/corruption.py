"""Common corruptions: noise, blur, weather and the like, as cameras and the world make them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from dfmcl.common.errors import BadInput
from dfmcl.robustness.corruptions.severities import LEVELS, PUBLISHED
from dfmcl.robustness.threats.threat import Threat
from dfmcl.robustness.threats.transforms import Transforms
from dfmcl.robustness.threats.union import Union

if TYPE_CHECKING:
    from torch import Tensor

ALL = "corruptions"


@dataclass(frozen=True)
class Corruption(Transforms):
    """One corruption at one severity: the image itself, and the image under it, always by the same draws."""

    kind, name, heads = "corruption", "", (ALL, *PUBLISHED)
    examples = ("fog@3", "fog", ALL)
    corruption: str
    severity: int

    @classmethod
    def parse(cls, text: str) -> Threat:
        """`fog@3`; `fog`, all five severities; `corruptions`, all severities of all fifteen."""
        corruption, mark, severity = text.partition("@")
        if corruption not in cls.heads or (mark and (corruption == ALL or severity not in map(str, LEVELS))):
            raise BadInput(f"threat {text}: write {ALL}, or one of {', '.join(PUBLISHED)}, alone or with @1 to @5")
        if mark:
            return cls(corruption, int(severity))
        chosen = PUBLISHED if corruption == ALL else (corruption,)
        return Union.of([cls(one, level) for one in chosen for level in LEVELS], title=corruption)

    @property
    def spelling(self) -> str:
        return f"{self.corruption}@{self.severity}"

    @property
    def label(self) -> str:
        return self.spelling

    def __str__(self) -> str:
        return self.spelling

    def fits(self, shape: tuple[int, ...]) -> None:
        if shape[0] not in (1, 3) or min(shape[1:]) < 8:
            raise BadInput(f"threat {self}: images are {shape}; it takes 1 or 3 channels and sides of 8 pixels or more")

    def count(self, shape: tuple[int, ...]) -> int:
        return 1

    def transformed(self, images: Tensor, numbers: Tensor) -> Tensor:
        import numpy as np
        import torch

        from dfmcl.robustness.corruptions.registry import corrupted

        pictures = images.permute(0, 2, 3, 1).cpu().numpy()
        if not len(pictures):
            return images.clone()
        found = np.stack([corrupted(picture, self.corruption, self.severity) for picture in pictures])
        return torch.from_numpy(found).permute(0, 3, 1, 2).contiguous().to(images.device)
