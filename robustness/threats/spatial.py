"""Rotation and translation: a grid of angles and shifts. Engstrom et al. 2019 (ICML), section 3.

Places and weights are whole numbers, so that every processor gives the same bytes: a member of today's evidence is one
wherever it is looked at.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dfmcl.common.errors import BadInput
from dfmcl.robustness.threats.transforms import Transforms

if TYPE_CHECKING:
    from torch import Tensor

# Coordinates are counted in 2^-POINT pixels: 1,000 pixels from the centre an angle's rounding moves a place by 2^-7.
POINT = 17
WEIGHT = 8  # bits of an interpolation's weight, so that four products and a byte stay far below 2^63
INTERPOLATIONS = ("bilinear", "nearest")
PADDINGS = ("black", "edge")
MOST_MEMBERS = 10**5
TINY = 1e-9  # 10 % of 30 pixels are 3, in floating point too


@dataclass(frozen=True)
class Extent:
    """How far an image may move along each axis: pixels, or a share of the side, rounded down to whole pixels."""

    length: float = 0.0
    share: bool = False

    def pixels(self, side: int) -> int:
        return math.floor(self.length * side + TINY) if self.share else int(self.length)

    def __str__(self) -> str:
        return f"{written(100 * self.length)}%" if self.share else written(self.length)


@dataclass(frozen=True)
class Spatial(Transforms):
    """A rotation about the centre by up to `degrees` either way, then a move by up to `shift` along each axis.

    steps: how many angles, moves down and moves right, each an odd number and evenly spaced from end to end, so that
    the image itself is among them; moves between whole pixels are interpolated. padding: `black`, or the `edge` drawn
    out. Degrees are positive towards the left (counter-clockwise).
    """

    kind, name, heads = "spatial", "", ("rotation", "shift")
    examples = ("rotation:30", "shift:10%", "rotation:30+shift:10%", "rotation:30+shift:3,5x7x7,nearest,edge")
    degrees: float = 0.0
    shift: Extent = Extent()
    steps: tuple[int, int, int] = (5, 5, 5)
    interpolation: str = "bilinear"
    padding: str = "black"

    def __post_init__(self) -> None:
        if not 0 <= self.degrees <= 180 or not 0 <= self.shift.length < (1 if self.shift.share else 10**4):
            raise BadInput(f"threat {self.spelling}: degrees lie in (0, 180], a shift below 100%")
        if self.degrees == 0 and self.shift.length == 0:
            raise BadInput(f"threat {self.spelling}: moves nothing; name more than 0 degrees or pixels")
        if any(count < 1 or count % 2 == 0 for count in self.steps) or math.prod(self.steps) > MOST_MEMBERS:
            raise BadInput(
                f"threat {self.spelling}: steps are three odd numbers, at most {MOST_MEMBERS:,} together, so that the "
                "image itself is among them"
            )

    @classmethod
    def parse(cls, text: str) -> Spatial:
        """`rotation:30` (31 angles), `shift:10%` or `shift:3` (7 x 7), both with + (5 x 5 x 5), then options by commas:
        steps such as 31x5x5, bilinear or nearest, black or edge."""
        moves, *options = (part.strip() for part in text.split(","))
        found: dict[str, str] = {}
        for move in moves.split("+"):
            head, _, size = move.strip().partition(":")
            if head not in cls.heads or head in found:
                raise BadInput(f"threat {text}: write rotation:DEGREES, shift:PIXELS or shift:SHARE%, or both with +")
            found[head] = size
        turns, moved = ("rotation" in found), ("shift" in found)
        given: dict[str, str | tuple[int, int, int]] = {
            "steps": (5, 5, 5) if turns and moved else (31, 1, 1) if turns else (1, 7, 7)
        }
        for option in options:
            given |= _option(option, text)
        degrees = _number(found["rotation"], text) if turns else 0.0
        shift = _extent(found["shift"], text) if moved else Extent()
        return cls(degrees, shift, **given)  # type: ignore[arg-type]  # a table of options holds two types

    @property
    def spelling(self) -> str:
        return f"{self._moves}{','.join(('', 'x'.join(map(str, self.steps)), self.interpolation, self.padding))}"

    @property
    def label(self) -> str:
        """The spelling without what is usual."""
        short = Spatial.parse(self._moves)
        unusual = ["x".join(map(str, self.steps))] if self.steps != short.steps else []
        unusual += [self.interpolation] if self.interpolation != short.interpolation else []
        unusual += [self.padding] if self.padding != short.padding else []
        return ", ".join([self._moves.replace(":", " ").replace("+", " + ").replace("%", " %"), *unusual])

    def __str__(self) -> str:
        return self.label

    @property
    def _moves(self) -> str:
        moves = [f"rotation:{written(self.degrees)}"] if self.degrees else []
        return "+".join([*moves, *([f"shift:{self.shift}"] if self.shift.length else [])])

    def fits(self, shape: tuple[int, ...]) -> None:
        if self.shift.length and not 0 < self.shift.pixels(min(shape[1:])) < max(shape[1:]):
            raise BadInput(f"threat {self}: moves images of {shape[1]}x{shape[2]} by no pixel, or out of sight")

    def count(self, shape: tuple[int, ...]) -> int:
        return math.prod(self.steps)

    def placed(self, number: int, shape: tuple[int, ...]) -> tuple[float, float, float]:
        """Degrees, pixels down and pixels right of a transform of images `(C, H, W)`."""
        rest, column = divmod(number, self.steps[2])
        turn, row = divmod(rest, self.steps[1])
        most = (self.degrees, self.shift.pixels(shape[1]), self.shift.pixels(shape[2]))
        turned, down, right = (
            reach * (2 * place - (count - 1)) / (count - 1) if count > 1 else 0.0
            for reach, place, count in zip(most, (turn, row, column), self.steps, strict=True)
        )
        return turned, down, right

    def transformed(self, images: Tensor, numbers: Tensor) -> Tensor:
        import torch

        whole = []
        for number in numbers.tolist():
            turned, down, right = self.placed(number, tuple(images.shape[1:]))
            angle = math.radians(turned)
            whole.append([round(value * 2 ** (POINT - 1)) for value in (math.cos(angle), math.sin(angle), down, right)])
        if not whole:
            return images.clone()
        table = torch.tensor(whole, device=images.device).view(-1, 4, 1, 1)

        return _sampled(images, table, self.interpolation == "bilinear", self.padding == "edge")


def _sampled(images: Tensor, table: Tensor, bilinear: bool, edge: bool) -> Tensor:
    """Each image turned and moved; cosine, sine, moves down and right `(N, 4, 1, 1)` in 2^-(POINT - 1)."""
    import torch

    (height, width), (cosine, sine, down, right) = images.shape[2:], table.unbind(dim=1)
    half = 1 << (POINT - 1)
    # In half pixels from the centre, so that both are whole; where a pixel goes is asked backwards, from its place.
    y = 2 * torch.arange(height, device=images.device).view(1, -1, 1) - (height - 1)
    x = 2 * torch.arange(width, device=images.device).view(1, 1, -1) - (width - 1)
    y, x = y * half - 2 * down, x * half - 2 * right  # of half a pixel in 2^-(POINT - 1)
    rows = ((cosine * y + sine * x) >> (POINT - 1)) + (height - 1) * half
    columns = ((cosine * x - sine * y) >> (POINT - 1)) + (width - 1) * half
    if not bilinear:
        return _taken(images, (rows + half) >> POINT, (columns + half) >> POINT, edge).to(torch.uint8)
    unit = 1 << WEIGHT
    (top, low), (left, far) = (
        (place >> POINT, (place & ((1 << POINT) - 1)) >> (POINT - WEIGHT)) for place in (rows, columns)
    )
    total = torch.full(images.shape, 1 << (2 * WEIGHT - 1), device=images.device)  # a half, so that it rounds
    for row, weight in ((top, unit - low), (top + 1, low)):
        for column, other in ((left, unit - far), (left + 1, far)):
            total += _taken(images, row, column, edge) * (weight * other)[:, None]
    return (total >> (2 * WEIGHT)).to(torch.uint8)


def _taken(images: Tensor, rows: Tensor, columns: Tensor, edge: bool) -> Tensor:
    """Pixels `(N, C, H, W)` at places `(N, H, W)`; outside nothing, or the nearest one."""
    height, width = images.shape[2:]
    near_rows, near_columns = rows.clamp(0, height - 1), columns.clamp(0, width - 1)
    places = (near_rows * width + near_columns).flatten(1)[:, None].expand(-1, images.shape[1], -1)
    pixels = images.flatten(2).gather(2, places).view(images.shape).long()
    inside = (rows == near_rows) & (columns == near_columns)
    return pixels if edge else pixels * inside[:, None]


def written(value: float) -> str:
    """The shortest text that is read as the number."""
    short = f"{value:g}"
    return short if float(short) == value else repr(value)


def _option(text: str, whole: str) -> dict[str, str | tuple[int, int, int]]:
    if text in INTERPOLATIONS:
        return {"interpolation": text}
    if text in PADDINGS:
        return {"padding": text}
    counts = text.split("x")
    if len(counts) != 3 or not all(count.isdecimal() for count in counts):
        known = ", ".join((*INTERPOLATIONS, *PADDINGS))
        raise BadInput(f"threat {whole}: {text!r} is unknown; choose {known}, or steps such as 31x5x5")
    return {"steps": (int(counts[0]), int(counts[1]), int(counts[2]))}


def _extent(text: str, whole: str) -> Extent:
    if text.endswith("%"):
        return Extent(_number(text[:-1], whole) / 100, share=True)
    pixels = _number(text, whole)
    if pixels != int(pixels):
        raise BadInput(f"threat {whole}: a shift is whole pixels or a share such as 10%")
    return Extent(pixels)


def _number(text: str, whole: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise BadInput(f"threat {whole}: {text!r} is no size; write a number above 0")
    return value
