"""Subspaces in which data live: perturbations alike in all channels, of low frequency, on values that the data have,
at places where the data differ."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from copy import copy
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional

from dfmcl.robustness.threats.ball import Ball
from dfmcl.robustness.threats.l2 import L2
from dfmcl.robustness.threats.linf import Linf
from dfmcl.robustness.threats.registry import by_norm

COARSE = 2  # pixels from one free value to the next, where frequencies are low
# Interpolation to how many pixels beyond its own a value reaches. Linear slopes have next to nothing in the upper half
# of the frequencies; blocks have edges, but more strength where much of an image is black or white (20/255, grey: a
# plain network holds on 3 of 64 digits, and on 12 under slopes).
LOW = {"linear": 1, "nearest": 0}
HALVINGS = 10  # of the scale at which an L2 perturbation is rounded; a thousandth of a length is less than a level
CHANNELS = 4  # with more of them, none is attacked by itself
VARIED = 0.25  # of the images have another level than the median there, or a place is one that seldom changes
TINY = 1e-6  # 8/255 * 255 must stay 8 in floating point
FEW = 32  # values from which all images are interpolated; more are no lattice
NEAR = 2.5  # levels by which rounding to bytes moves what an image was interpolated from
NOWHERE = 10**6  # a level outside every ball


@dataclass(frozen=True)
class Subspace:
    """A set of perturbations, in whole grey levels.

    grey: alike in all channels.
    low: a key of LOW, by which it is drawn from values `COARSE` pixels apart.
    channel: which one is perturbed, where it is only one.
    lattice: `values` that the batch of clean images has anywhere, or `places`: that it has at this row and column, or
    `coarse`: of the values from which it is interpolated.
    varied: only places where the images of the batch differ, as no margin or corner does that is seldom inked.
    """

    grey: bool = False
    low: str = ""
    channel: int | None = None
    lattice: str = ""
    varied: bool = False


# A point in a combination lies in each of its parts, so it passes a switch on any of them, and on all at once. Only
# slopes are rounded, to whole levels or to the lattice.
SUBSPACES: dict[str, Subspace] = {
    "grey": Subspace(grey=True),
    "lattice": Subspace(lattice="values"),
    "low": Subspace(low="linear"),
    "blocks": Subspace(low="nearest"),
    "channel": Subspace(channel=0),
    "varied": Subspace(varied=True),
    "grey+blocks": Subspace(grey=True, low="nearest"),
    "grey+low": Subspace(grey=True, low="linear"),
    "grey+lattice": Subspace(grey=True, lattice="values"),
    "grey+varied": Subspace(grey=True, varied=True),
    "grey+places": Subspace(grey=True, lattice="places"),
    "grey+low+lattice": Subspace(grey=True, low="linear", lattice="values"),
}


def subspaces(x: Tensor) -> dict[str, Subspace]:
    """Those of images `(N, C, H, W)`, each once.

    `channel` stands for each channel. One channel is grey anyway, and a lattice of all 256 values none: there
    perturbations of whole levels remain. Grey on a lattice is left out where images are coloured, as equal steps from
    values that differ do not end on the lattice. Where all places vary, or none, there is no such part.
    """
    channels, coloured = x.shape[1], bool((x != x[:, :1]).any())
    dense = len((255 * x).round().unique()) == 256
    everywhere = len({*varied(x).flatten().tolist()}) < 2
    once: dict[Subspace, str] = {}
    for name, space in SUBSPACES.items():
        if coloured and space.grey and space.lattice:
            continue
        if space.varied and everywhere:
            continue
        several = range(channels if 1 < channels <= CHANNELS else 0)
        lattice = "" if dense and space.lattice == "values" else space.lattice
        plain = replace(space, grey=space.grey and channels > 1, lattice=lattice)
        named = {name: plain} if space.channel is None else {f"{name} {k}": replace(plain, channel=k) for k in several}
        for one, found in named.items():
            once.setdefault(found, one)
    return {name: space for space, name in once.items()}


def interpolated(x: Tensor, threat: Ball) -> dict[str, Subspace]:
    """Where images `(N, C, H, W)` are grey, and interpolated from a few values as digits are: what is so, too.

    Empty of others, and where no value is another's neighbour inside the ball. In Linf only: a length is met by
    scaling, which leaves the lattice.
    """
    if not isinstance(threat, Linf) or bool((x != x[:, :1]).any()) or (levels := coarse_levels(x)) is None:
        return {}
    steps = levels.unique().diff()
    near = bool(((steps > 2 * NEAR) & (steps <= math.floor(255 * threat.eps + TINY))).any())
    return {"grey+low+coarse": Subspace(grey=True, low="linear", lattice="coarse")} if near else {}


def coarse_levels(x: Tensor) -> Tensor | None:
    """The levels `(N, 1, h, w)` from which grey images are interpolated, each one of a few; None where they are not."""
    rows, columns = (_drawn(length, "linear", x) for length in x.shape[2:])
    if not len(x) or min(x.shape[2:]) < 2 * COARSE:
        return None
    found = torch.linalg.pinv(rows.T) @ x[:, :1] @ torch.linalg.pinv(columns)
    if bool(((rows.T @ found @ columns - x[:, :1]).abs() > NEAR / 255).any()):
        return None
    levels = (255 * found).round().clamp(0, 255)
    counts = levels.long().flatten().bincount(minlength=256).to(x.dtype)
    # Rounding scatters a value over its neighbours: of these the commonest is taken.
    around = functional.max_pool1d(counts[None], 5, 1, 2)[0]
    peaks = ((counts == around) & (counts > 0)).nonzero().squeeze(1).to(x.dtype)
    return peaks[(levels[..., None] - peaks).abs().argmin(dim=-1)] if len(peaks) <= FEW else None


def varied(x: Tensor) -> Tensor:
    """Where images `(N, C, H, W)` differ: `(1, 1, H, W)` bool, by the channel that differs most."""
    if not len(x):
        return x.new_zeros(1, 1, *x.shape[2:], dtype=torch.bool)
    levels = (255 * x).round()
    shares = (levels != levels.median(dim=0, keepdim=True).values).to(x.dtype).mean(dim=0, keepdim=True)
    return shares.amax(dim=1, keepdim=True) >= VARIED


class Chart(ABC):
    """Coordinates of a subspace around images x `(N, C, H, W)`: free values between bounds, and the images there.

    Images are whole grey levels away from x where the radius is a level or more: rounding to bytes changes nothing,
    and a network that answers otherwise between levels is never asked there. lower, upper `(N, C', H', W')`: how far
    each coordinate goes inside [0, 1], and in Linf inside the ball. Nothing is clipped, which would bring high
    frequencies.
    """

    def __init__(self, space: Subspace, x: Tensor, threat: Ball) -> None:
        self.space, self.x, self.threat = space, x, threat
        self.whole = 255 * threat.eps + TINY >= 1
        self.lower, self.upper = -self._free(x), self._free(1 - x)
        self.coarse = coarse_levels(x) if space.lattice == "coarse" and self.whole else None
        if self.coarse is not None:  # between two values lies no level outside [0, 1]
            self.values = Lattice.of(self.coarse / 255, "values")
            self.lower = -(self.coarse / 255).clamp(max=self._reach)
            self.upper = (1 - self.coarse / 255).clamp(max=self._reach)
        if space.varied:
            self.open = varied(x)
            self.lower, self.upper = self.open * self.lower, self.open * self.upper
        self.rows, self.columns = (_drawn(length, space.low, x) for length in x.shape[2:])
        pixels = self.whole and space.lattice not in ("", "coarse")
        self.lattice = Lattice.of(x, space.lattice) if pixels else None

    def of(self, rows: Tensor) -> Chart:
        """The chart around some of the images."""
        part = copy(self)
        part.x, part.lower, part.upper = self.x[rows], self.lower[rows], self.upper[rows]
        part.coarse = None if self.coarse is None else self.coarse[rows]
        return part

    def spread(self, coordinates: Tensor) -> Tensor:
        """The perturbation `(N, C, H, W)` that they stand for; linear."""
        if self.space.low:
            coordinates = self.rows.T @ coordinates @ self.columns
        if self.space.channel is None:
            return coordinates.expand_as(self.x)
        behind = self.x.shape[1] - 1 - self.space.channel
        return functional.pad(coordinates, (0, 0, 0, 0, self.space.channel, behind))

    def project(self, coordinates: Tensor) -> Tensor:
        """Into the bounds and the ball."""
        return torch.minimum(torch.maximum(coordinates, self.lower), self.upper)

    def start(self, generator: torch.Generator) -> Tensor:
        """Random coordinates."""
        like = self.lower
        uniform = torch.rand(like.shape, generator=generator, device=like.device, dtype=like.dtype)
        return self.project(self.lower + uniform * (self.upper - self.lower))

    @abstractmethod
    def steepest(self, gradient: Tensor) -> Tensor:
        """The step of length 1 that raises the loss most, by the loss's gradient."""

    def images(self, coordinates: Tensor) -> Tensor:
        """Images `(N, C, H, W)` in the subspace; to a gradient, rounding is the identity."""
        wanted = self.spread(coordinates)
        exact = self.spread(self._on_values(coordinates.detach()))
        if not self.whole:
            return (self.x + exact).clamp(0, 1) + (wanted - wanted.detach())
        clean = (255 * self.x).round()
        # Written so that images on the uint8 grid stay there to the last digit.
        there = (clean + self._rounded(255 * exact, clean)) / 255 + (self.x - clean / 255)
        return there.clamp(0, 1) + (wanted - wanted.detach())

    @abstractmethod
    def _rounded(self, moved: Tensor, clean: Tensor) -> Tensor:
        """Whole levels inside the ball that are allowed, near `moved` levels from the clean ones."""

    def _on_values(self, coordinates: Tensor) -> Tensor:
        """The nearest coordinates that lead from one coarse value to another; the same where there are none."""
        if self.coarse is None:
            return coordinates
        return self.values.nearest(255 * coordinates, self.coarse, math.floor(255 * self.threat.eps + TINY)) / 255

    def _nearest(self, moved: Tensor, clean: Tensor) -> Tensor:
        if self.lattice is None:
            return moved.round()
        return self.lattice.nearest(moved, clean, math.floor(255 * self.threat.eps + TINY))

    @property
    @abstractmethod
    def _reach(self) -> float:
        """How far one value may move."""

    def _free(self, room: Tensor) -> Tensor:
        """Of room `(N, C, H, W)` on one side: how far each coordinate may go."""
        room = room.clamp(max=self._reach)
        if self.whole:
            room = (255 * room + TINY).floor() / 255
        if self.space.grey:
            room = room.amin(dim=1, keepdim=True)
        if self.space.channel is not None:
            room = room[:, self.space.channel : self.space.channel + 1]
        if self.space.low:
            (height, width), beyond = room.shape[2:], LOW[self.space.low]
            room = functional.pad(room, (0, width % COARSE, 0, height % COARSE), value=torch.inf)
            room = -functional.max_pool2d(-room, COARSE + 2 * beyond, COARSE, beyond)
        return room


class LinfChart(Chart):
    """In Linf the bounds are the ball."""

    @property
    def _reach(self) -> float:
        return self.threat.eps

    def steepest(self, gradient: Tensor) -> Tensor:
        return gradient.sign()

    def _rounded(self, moved: Tensor, clean: Tensor) -> Tensor:
        return self._nearest(moved, clean)


class L2Chart(Chart):
    """In L2 a coordinate may go as far as [0, 1] does, and the length of all that they move is bounded."""

    @property
    def _reach(self) -> float:
        return 1.0

    def project(self, coordinates: Tensor) -> Tensor:
        inside = super().project(coordinates)
        length = L2.lengths(self.spread(inside)).clamp_min(1e-12)
        return inside * (self.threat.eps / length).clamp(max=1.0).view(-1, 1, 1, 1)

    def steepest(self, gradient: Tensor) -> Tensor:
        if self.space.varied:
            gradient = self.open * gradient
        if self.space.low:  # where slopes overlap, the steepest way is not along the gradient of the coordinates
            rows, columns = (torch.linalg.inv(drawn @ drawn.T) for drawn in (self.rows, self.columns))
            gradient = rows @ gradient @ columns
        return gradient / L2.lengths(self.spread(gradient)).clamp_min(1e-12).view(-1, 1, 1, 1)

    def _rounded(self, moved: Tensor, clean: Tensor) -> Tensor:
        """Of the longest perturbation whose whole levels fit."""
        low, high = moved.new_zeros(len(moved), 1, 1, 1), moved.new_ones(len(moved), 1, 1, 1)
        scale = high
        for _ in range(HALVINGS):
            length = L2.lengths(self._nearest(scale * moved, clean)).view(-1, 1, 1, 1)
            inside = length <= 255 * self.threat.eps
            low, high = torch.where(inside, scale, low), torch.where(inside, high, scale)
            scale = (low + high) / 2
        return self._nearest(low * moved, clean)


CHARTS: dict[str, type[Chart]] = {"linf": LinfChart, "l2": L2Chart}


def chart_of(space: Subspace, x: Tensor, threat: Ball) -> Chart:
    """BadInput where nothing is known of the threat's balls in a subspace."""
    return by_norm(CHARTS, threat.norm, "subspace")(space, x, threat)


def _drawn(length: int, mode: str, like: Tensor) -> Tensor:
    """What each coarse value adds to each pixel of a line, `(coarse, length)`; empty where nothing is coarse."""
    if not mode:
        return like.new_zeros(0, length)
    each = torch.eye(-(-length // COARSE), dtype=like.dtype, device=like.device)[None]
    return functional.interpolate(each, scale_factor=COARSE, mode=mode)[0, :, :length]


@dataclass(frozen=True)
class Lattice:
    """Which grey levels are allowed: below and above `(P * 256,)` are the nearest from each level on, P places."""

    below: Tensor
    above: Tensor
    place: Tensor

    @staticmethod
    def of(x: Tensor, kind: str) -> Lattice:
        """The levels of images `(N, C, H, W)`, all together (`values`), or by row and column (`places`)."""
        levels = (255 * x).round().long()
        height, width = x.shape[2:] if kind == "places" else (1, 1)
        place = 256 * torch.arange(height * width, device=x.device).view(height, width)
        allowed = torch.zeros(height * width * 256, dtype=torch.bool, device=x.device)
        allowed[(place + levels).flatten()] = True
        each = torch.arange(256, device=x.device).expand(height * width, 256)
        mask = allowed.view(-1, 256)
        below = each.masked_fill(~mask, -NOWHERE).cummax(dim=1).values
        above = each.masked_fill(~mask, NOWHERE).flip(1).cummin(dim=1).values.flip(1)
        return Lattice(below.flatten().to(x.dtype), above.flatten().to(x.dtype), place)

    def nearest(self, moved: Tensor, clean: Tensor, limit: int) -> Tensor:
        """From clean levels by `moved`, as a way to an allowed level at most `limit` away; a clean one is allowed."""
        target = (clean + moved).clamp(0, 255)
        below = self.below[self.place + target.floor().long()] - clean
        above = self.above[self.place + target.ceil().long()] - clean
        way = target - clean
        far = [torch.where(level.abs() <= limit, (level - way).abs(), torch.inf) for level in (below, above)]
        return torch.where(far[0] <= far[1], below, above)
