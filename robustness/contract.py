"""What a model takes: the size, layout and type of its images. Every model has one; attacks see (N, C, H, W) floats."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dfmcl.common.errors import BadInput

LAYOUTS = ("NHWC", "NCHW")
DTYPES = {"uint8": torch.uint8, "float32": torch.float32, "float64": torch.float64, "float16": torch.float16}
FORM = "expected DTYPE LAYOUT [HxWxC], such as 'uint8 NHWC 32x32x3' or 'float32 NCHW'"


@dataclass(frozen=True)
class InputContract:
    """Images of height x width pixels with `channels`; layout NHWC or NCHW; dtype uint8, or floats in [0, 1]."""

    height: int
    width: int
    channels: int
    layout: str = "NHWC"
    dtype: str = "uint8"

    def __post_init__(self) -> None:
        if self.layout not in LAYOUTS or self.dtype not in DTYPES or min(self.shape) < 1:
            raise BadInput(f"input {str(self)!r}: {FORM}; DTYPE is one of {', '.join(DTYPES)}")

    def __str__(self) -> str:
        return f"{self.dtype} {self.layout} {self.height}x{self.width}x{self.channels}"

    @property
    def shape(self) -> tuple[int, int, int]:
        """(H, W, C), whatever the layout: as data sets and manifests write it."""
        return self.height, self.width, self.channels

    @property
    def dims(self) -> tuple[int, int, int]:
        """The shape of one image as the model takes it."""
        height, width, channels = self.shape
        return self.shape if self.layout == "NHWC" else (channels, height, width)

    @staticmethod
    def parse(text: str, dims: Sequence[int | None] = ()) -> InputContract:
        """From 'uint8 NHWC 32x32x3'.

        dims: what a file says of its input (N, ., ., .), None where it leaves a size open. The text may leave out the
        size where the file gives it, and may not contradict it.
        """
        found = re.fullmatch(r"\s*(\w+)\s+(\w+)(?:\s+(\d+)x(\d+)x(\d+))?\s*", text)
        if not found or found[1] not in DTYPES or found[2] not in LAYOUTS:
            raise BadInput(f"input {text!r}: {FORM}; DTYPE is one of {', '.join(DTYPES)}")
        dtype, layout, *size = found.groups()
        sizes: list[int | None] = [int(side) if side else None for side in size]
        if dims:
            if len(dims) != 4:
                raise BadInput(f"input {text!r}: the model takes {len(dims)} dimensions, images have 4: (N, ., ., .)")
            filed = list(dims[1:]) if layout == "NHWC" else [dims[2], dims[3], dims[1]]
            if any(None not in (said, known) and said != known for said, known in zip(sizes, filed, strict=True)):
                raise BadInput(f"input {text!r}: the model says {_size(filed)} (height x width x channels) in {layout}")
            sizes = [said or known for said, known in zip(sizes, filed, strict=True)]
        height, width, channels = sizes
        if height is None or width is None or channels is None:
            raise BadInput(f"input {text!r}: the size is open; add it, such as '{dtype} {layout} 32x32x3'")
        return InputContract(height, width, channels, layout, dtype)

    def to_json(self) -> dict[str, Any]:
        return {"dtype": self.dtype, "layout": self.layout, "shape": list(self.shape)}

    @staticmethod
    def from_json(value: Mapping[str, Any]) -> InputContract:
        """The inverse of `to_json`; a candidate's manifest names its input as well, which is no matter here."""
        try:
            height, width, channels = (int(size) for size in value["shape"])
            return InputContract(height, width, channels, str(value["layout"]), str(value["dtype"]))
        except (KeyError, TypeError, ValueError) as error:
            raise BadInput(f"input contract: {error!r} in {value}") from None

    def rounded(self, x: Tensor) -> Tensor:
        """Floats as the model will see them: on the uint8 grid where it takes bytes, else as they are."""
        return (x * 255).round() / 255 if self.dtype == "uint8" else x

    def wire(self, x: Tensor) -> Tensor:
        """Float `(N, C, H, W)` in [0, 1] as the model takes it."""
        whole = ((x * 255).round() if self.dtype == "uint8" else x).to(DTYPES[self.dtype])
        return (whole.permute(0, 2, 3, 1) if self.layout == "NHWC" else whole).contiguous()

    def relaxed(self, x: Tensor) -> Tensor:
        """The same for a model whose uint8 input was widened to floats in [0, 255]: nothing is rounded, x has a
        gradient."""
        scaled = x * 255 if self.dtype == "uint8" else x.to(DTYPES[self.dtype])
        return scaled.permute(0, 2, 3, 1) if self.layout == "NHWC" else scaled


def _size(sizes: Sequence[int | None]) -> str:
    return "x".join("?" if size is None else str(size) for size in sizes)
