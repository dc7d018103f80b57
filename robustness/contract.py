"""What a model takes: size, layout and type of its images, and their scale. Attacks see (N, C, H, W) floats."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import torch
from torch import Tensor

from dfmcl.common.errors import BadInput
from dfmcl.robustness.scale import GREY, ORDERS, PLAIN, WORDS, Scale

# The axes of one image in the order in which the model takes them; a flat one is one row of H * W * C numbers.
LAYOUTS = {"NHWC": "HWC", "NCHW": "CHW", "flat-HWC": "HWC", "flat-CHW": "CHW"}
FLAT = "flat"  # in words, where images of one channel leave no choice of order
FOUR = ("NHWC", "NCHW")
DTYPES = {"uint8": torch.uint8, "float32": torch.float32, "float64": torch.float64, "float16": torch.float16}
SIZE = re.compile(r"(\d+)x(\d+)x(\d+)")
FORM = (
    "expected DTYPE LAYOUT HxWxC [SCALE], such as 'uint8 NHWC 32x32x3' or 'float32 NCHW 224x224x3 imagenet'; DTYPE is"
    f" one of {', '.join(DTYPES)}, LAYOUT of {', '.join(LAYOUTS)}, SCALE of {WORDS}"
)


@dataclass(frozen=True)
class InputContract:
    """Images of height x width pixels with `channels`; a layout of LAYOUTS; dtype uint8, or floats on a scale.

    Bytes are bytes: of their scale only the order of the channels may differ from RGB.
    """

    height: int
    width: int
    channels: int
    layout: str = "NHWC"
    dtype: str = "uint8"
    scale: Scale = PLAIN

    def __post_init__(self) -> None:
        if self.layout not in LAYOUTS or self.dtype not in DTYPES or min(self.shape) < 1:
            raise BadInput(f"input {str(self)!r}: {FORM}")
        try:
            self.scale.require_channels(self.channels)
        except BadInput as error:
            raise BadInput(f"input {str(self)!r}: {error}") from None
        if self.dtype == "uint8" and replace(self.scale, order="RGB") != PLAIN:
            raise BadInput(
                f"input {str(self)!r}: uint8 images come as bytes; leave the scale out, and make it a first layer of"
                " the model"
            )

    def __str__(self) -> str:
        size = f"{self.height}x{self.width}x{self.channels}"
        return " ".join(filter(None, (self.dtype, self.layout, size, str(self.scale))))

    @property
    def shape(self) -> tuple[int, int, int]:
        """(H, W, C), whatever the layout: as data sets and manifests write it."""
        return self.height, self.width, self.channels

    @property
    def dims(self) -> tuple[int, ...]:
        """The shape of one image as the model takes it."""
        sides = dict(zip("HWC", self.shape, strict=True))
        ordered = tuple(sides[axis] for axis in LAYOUTS[self.layout])
        return (prod(ordered),) if self.flat else ordered

    @property
    def flat(self) -> bool:
        """Whether an image is one row of numbers."""
        return self.layout not in FOUR

    @property
    def channels_first(self) -> bool:
        return LAYOUTS[self.layout] == "CHW"

    def arranged(self, x: Tensor) -> Tensor:
        """`(N, C, H, W)` of any type in the order and the shape that the model takes."""
        ordered = x if self.channels_first else x.permute(0, 2, 3, 1)
        return ordered.flatten(1) if self.flat else ordered

    @staticmethod
    def parse(text: str, dims: Sequence[int | None] = (), dtype: str = "") -> InputContract:
        """From 'uint8 NHWC 32x32x3' or 'float32 NCHW 224x224x3 imagenet'.

        dims, dtype: what a file says of its input (N, ., ., .), None where it leaves a size open. The text may leave
        out what the file gives, and may not contradict its size.
        """
        words = text.split()
        try:
            size = next((found for word in words if (found := SIZE.fullmatch(word))), None)
            said, layout = _one(words, DTYPES) or dtype, _one(words, (*LAYOUTS, FLAT)) or _layout(dims)
            rest = [word for word in words if word not in (said, layout) and not (size and word == size[0])]
            layout = _ordered(size) if layout == FLAT else layout
            if not said or not layout:
                raise BadInput(f"it lacks {'LAYOUT' if said else 'DTYPE'}; {FORM}")
            height, width, channels = _sides(size, dims, layout, f"{said} {layout}")
            scale = _scale(rest, channels)
        except BadInput as error:
            raise BadInput(f"input {text!r}: {error}") from None
        scale = replace(scale, top=1) if said == "uint8" and (scale.mean, scale.std) == ((0,), (1,)) else scale
        return InputContract(height, width, channels, layout, said, scale)

    def to_json(self) -> dict[str, Any]:
        """A scale that is plain is not written."""
        plain = {"dtype": self.dtype, "layout": self.layout, "shape": list(self.shape)}
        return plain if self.scale == PLAIN else {**plain, **self.scale.to_json()}

    @staticmethod
    def from_json(value: Mapping[str, Any]) -> InputContract:
        """The inverse of `to_json`; a candidate's manifest names its input as well, which is no matter here."""
        try:
            height, width, channels = (int(size) for size in value["shape"])
            scale = Scale.from_json(value)
            return InputContract(height, width, channels, str(value["layout"]), str(value["dtype"]), scale)
        except (KeyError, TypeError, ValueError) as error:
            raise BadInput(f"input contract: {error!r} in {value}") from None

    def rounded(self, x: Tensor) -> Tensor:
        """Floats as the model will see them: on the uint8 grid where it takes bytes, else as they are."""
        return (x * 255).round() / 255 if self.dtype == "uint8" else x

    def wire(self, x: Tensor) -> Tensor:
        """Float `(N, C, H, W)` in [0, 1] as the model takes it."""
        scaled = self.scale.applied(x)
        whole = ((scaled * 255).round() if self.dtype == "uint8" else scaled).to(DTYPES[self.dtype])
        return self.arranged(whole).contiguous()

    def relaxed(self, x: Tensor) -> Tensor:
        """The same for a model whose uint8 input was widened to floats in [0, 255]: nothing is rounded, x has a
        gradient."""
        scaled = self.scale.applied(x)
        scaled = scaled * 255 if self.dtype == "uint8" else scaled.to(DTYPES[self.dtype])
        return self.arranged(scaled)


def _one(words: Sequence[str], known: Mapping[str, Any] | Sequence[str]) -> str:
    """The one of `known` among the words, nothing where there is none."""
    found = [word for word in words if word in known]
    if len(found) > 1:
        raise BadInput(f"{' and '.join(found)} exclude each other; {FORM}")
    return found[0] if found else ""


def _ordered(size: re.Match[str] | None) -> str:
    """`flat` with its order: of one channel both are the same, of several somebody has to say it."""
    if size is not None and int(size[3]) == 1:
        return "flat-HWC"
    raise BadInput(
        "flat is one row of numbers an image: say the size and in which order they lie, such as 'flat-HWC 32x32x3'"
        " (all channels of a pixel together) or 'flat-CHW 32x32x3' (all pixels of a channel together)"
    )


def _layout(dims: Sequence[int | None]) -> str:
    """Where a file's channels are, because images have 1 or 3 of them; nothing where that does not tell."""
    if len(dims) == 2:
        raise BadInput(
            f"the model takes {dims[1] or 'a row of'} numbers an image; say how they are made of it, such as 'flat"
            " 28x28x1' where there is one channel, else 'flat-HWC 32x32x3' or 'flat-CHW 32x32x3'"
        )
    told = {"NCHW": dims[1], "NHWC": dims[3]} if len(dims) == 4 else {}
    found = [layout for layout, channels in told.items() if channels in (1, 3)]
    return found[0] if len(found) == 1 else ""


def _sides(size: re.Match[str] | None, dims: Sequence[int | None], layout: str, declared: str) -> tuple[int, int, int]:
    """Height, width and channels, from the text or the file; BadInput where neither gives them, or they differ."""
    sizes: list[int | None] = [int(side) for side in size.groups()] if size else [None] * 3
    if dims and layout not in FOUR:
        if len(dims) != 2:
            raise BadInput(f"the model takes {len(dims)} dimensions, flat images have 2: (N, .)")
        if size and dims[1] not in (None, prod(map(int, size.groups()))):
            raise BadInput(f"the model takes {dims[1]} numbers an image, {size[0]} are {prod(map(int, size.groups()))}")
    elif dims:
        if len(dims) != 4:
            raise BadInput(f"the model takes {len(dims)} dimensions, images have 4: (N, ., ., .)")
        filed = list(dims[1:]) if layout == "NHWC" else [dims[2], dims[3], dims[1]]
        if any(None not in (said, known) and said != known for said, known in zip(sizes, filed, strict=True)):
            raise BadInput(f"the model says {_size(filed)} (height x width x channels) in {layout}")
        sizes = [said or known for said, known in zip(sizes, filed, strict=True)]
    height, width, channels = sizes
    if height is None or width is None or channels is None:
        raise BadInput(f"the size is open; add it, such as '{declared} 32x32x3'")
    return height, width, channels


def _scale(words: Sequence[str], channels: int) -> Scale:
    colours = {GREY: 1, **dict.fromkeys(ORDERS, 3)}
    if odd := [word for word in words if colours.get(word, channels) != channels]:
        raise BadInput(f"{odd[0]} takes {colours[odd[0]]} of an image's channels, there are {channels}")
    try:
        return Scale.parse(words)
    except BadInput as error:
        raise BadInput(f"{error}; {FORM}") from None


def _size(sizes: Sequence[int | None]) -> str:
    return "x".join("?" if size is None else str(size) for size in sizes)
