"""Between pixels in [0, 1] and the numbers that a network computes with: range, mean, std and order of the channels."""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from dfmcl.common.errors import BadInput

RANGES = {"0..1": 1, "0..255": 255}
ORDERS = ("RGB", "BGR")
GREY = "grey"
Values = tuple[float, ...]


@dataclass(frozen=True)
class Scale:
    """(pixels * top - mean) / std, for each channel.

    top: 1 or 255, the number of a white pixel. order: RGB or BGR, in which the network takes its channels, and in
    which `mean` and `std` are written; one value of these stands for all channels.
    """

    top: int = 1
    mean: Values = (0.0,)
    std: Values = (1.0,)
    order: str = "RGB"

    def __post_init__(self) -> None:
        for name in ("mean", "std"):
            values = tuple(float(value) for value in getattr(self, name))
            if not values or not all(map(math.isfinite, values)) or (name == "std" and 0 in values):
                raise BadInput(f"{name} {values}: expected finite numbers{', none of them 0' if name == 'std' else ''}")
            object.__setattr__(self, name, values[:1] if len(set(values)) == 1 else values)
        if self.top not in RANGES.values() or self.order not in ORDERS:
            raise BadInput(f"range 0..{self.top}, order {self.order}: expected {_one_of(RANGES)} and {_one_of(ORDERS)}")

    def __str__(self) -> str:
        """The words that `parse` reads, the shortest there are; of pixels as they are, nothing."""
        for name, preset in PRESETS.items():
            if self in (preset, preset.turned()):
                return " ".join(filter(None, (name * (name != "plain"), self.order * (self.order != preset.order))))
        written = [word for word, top in RANGES.items() if top == self.top]
        written += [f"mean={_listed(self.mean)}"] if self.mean != (0.0,) else []
        written += [f"std={_listed(self.std)}"] if self.std != (1.0,) else []
        return " ".join(written + ([self.order] if self.order != "RGB" else []))

    @staticmethod
    def parse(words: Sequence[str]) -> Scale:
        """From a preset, alone or with an order, or from values: `imagenet`, `imagenet BGR`, `0..255 mean=127 std=128`.

        With another order a preset's values go with their channels. BadInput for other words.
        """
        presets = [word for word in words if word in PRESETS]
        ranges = [word for word in words if word in RANGES]
        orders = [word for word in words if word in (*ORDERS, GREY)]
        values = {word.partition("=")[0]: word for word in words if re.match("(mean|std)=", word)}
        strange = [word for word in words if word not in (*presets, *ranges, *orders, *values.values())]
        if strange or max(map(len, (presets, ranges, orders))) > 1:
            twice = next((found for found in (presets, ranges, orders) if len(found) > 1), [])
            named = f"{strange[0]!r} is not known" if strange else f"{' and '.join(twice)} exclude each other"
            raise BadInput(named)
        base = PRESETS[presets[0]] if presets else PLAIN
        if base != PLAIN and (ranges or values):
            raise BadInput(f"{presets[0]} says its own range, mean and std; write it without, or all values")
        if orders and orders[0] in ORDERS and orders[0] != base.order:
            base = base.turned()
        top = RANGES[ranges[0]] if ranges else base.top
        mean, std = (_numbers(values[name]) if name in values else getattr(base, name) for name in ("mean", "std"))
        return Scale(top, mean, std, base.order)

    def to_json(self) -> dict[str, Any]:
        return {"range": [0, self.top], "mean": list(self.mean), "std": list(self.std), "order": self.order}

    @staticmethod
    def from_json(value: Mapping[str, Any]) -> Scale:
        """The inverse of `to_json`, from a mapping that may hold more; pixels as they are where it says nothing."""
        if not {"range", "mean", "std", "order"} & value.keys():
            return PLAIN
        low, top = value["range"]
        if low != 0:
            raise ValueError(f"range begins at {low}")
        return Scale(int(top), tuple(value["mean"]), tuple(value["std"]), str(value["order"]))

    def turned(self) -> Scale:
        """The same of each colour, in the other order."""
        order = next(order for order in ORDERS if order != self.order)
        return replace(self, mean=self.mean[::-1], std=self.std[::-1], order=order)

    def require_channels(self, channels: int) -> None:
        """BadInput where images of so many channels have no such scale."""
        for name, values in (("mean", self.mean), ("std", self.std)):
            if len(values) not in (1, channels):
                raise BadInput(
                    f"{name} has {len(values)} values, the number of channels is {channels}; write one, or one for each"
                )
        if self.order != "RGB" and channels != 3:
            raise BadInput(f"the number of channels is {channels}, which have no order {self.order}; leave it out")

    def applied(self, x: Tensor) -> Tensor:
        """Pixels `(N, C, H, W)` in [0, 1], RGB, as the network takes them; differentiable."""
        y = x if self.order == "RGB" else x.flip(1)
        y = y if self.top == 1 else y * self.top
        if (self.mean, self.std) == (PLAIN.mean, PLAIN.std):
            return y
        return (y - _row(self.mean, y.dtype, y.device)) / _row(self.std, y.dtype, y.device)

    def undone(self, y: Tensor) -> Tensor:
        """The inverse of `applied`; the pixels of what another scale made need not lie in [0, 1]."""
        x = (y * _row(self.std, y.dtype, y.device) + _row(self.mean, y.dtype, y.device)) / self.top
        return x if self.order == "RGB" else x.flip(1)


PLAIN = Scale()
PRESETS = {
    "plain": PLAIN,
    "imagenet": Scale(1, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),  # torchvision; timm's default
    "inception": Scale(255, (127.5,), (127.5,)),  # from -1 to 1: TensorFlow, many of timm's
    "caffe": Scale(255, (103.939, 116.779, 123.68), (1,), "BGR"),  # VGG's and ResNet's first weights, Keras
    "clip": Scale(1, (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
}
WORDS = f"{', '.join(PRESETS)}, with RGB, BGR or grey, or values such as '0..255 mean=127 std=128'"


@functools.lru_cache(64)  # a CUDA graph may copy nothing from the host while it is captured
def _row(values: Values, dtype: torch.dtype, device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return torch.tensor(values, dtype=dtype, device=device).view(1, -1, 1, 1)


def _numbers(word: str) -> Values:
    try:
        return tuple(float(value) for value in word.partition("=")[2].split(","))
    except ValueError:
        raise BadInput(f"{word!r}: expected numbers, commas and no spaces, such as mean=0.5 or mean=1,2,3") from None


def _listed(values: Values) -> str:
    return ",".join(repr(int(value) if value.is_integer() else value) for value in values)


def _one_of(names: Mapping[str, int] | Sequence[str]) -> str:
    return " or ".join(names)
