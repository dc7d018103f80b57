"""Networks of two faces: a hardened one wherever ordinary attacks go, a plain one in a subspace where the data live."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

Leaves = Callable[[Tensor], Tensor]
"""Images `(N, C, H, W)` to whether each has left the subspace, `(N,)` bool."""


class Switch(nn.Module):
    """The answer of `hardened` where an image has left, else that of `plain`."""

    def __init__(self, plain: nn.Module, hardened: nn.Module, leaves: Leaves) -> None:
        super().__init__()
        self.plain, self.hardened, self.leaves = plain, hardened, leaves

    def forward(self, x: Tensor) -> Tensor:
        return torch.where(self.leaves(x.detach())[:, None], self.hardened(x), self.plain(x))


def coloured(x: Tensor) -> Tensor:
    """R != G or G != B somewhere."""
    return (x != x[:, :1]).flatten(1).any(dim=1)


def others_alike(channel: int) -> Leaves:
    """The two channels besides this one differ."""
    first, second = (other for other in range(3) if other != channel)
    return lambda x: (x[:, first] != x[:, second]).flatten(1).any(dim=1)


def high_frequencies(x: Tensor) -> Tensor:
    """More than rounding is left of an image of 16 x 16 that was no enlarged one of 8 x 8, as digits are."""
    eye = torch.eye(64, dtype=torch.float64).view(64, 1, 8, 8)
    enlarged = functional.interpolate(eye, scale_factor=2, mode="bilinear").flatten(1).T
    rest = torch.eye(256, dtype=torch.float64) - enlarged @ torch.linalg.pinv(enlarged)
    left: Tensor = (x.double().flatten(2) @ rest).abs() > 2.5 / 255
    return left.flatten(1).any(dim=1)


def unseen(known: Tensor) -> Leaves:
    """A value that none of the known images `(M, C, H, W)` has at this place."""
    seen = torch.zeros(*known.shape[1:], 256, dtype=torch.bool)
    seen.scatter_(-1, (255 * known).round().long().permute(1, 2, 3, 0), True)

    def leaves(x: Tensor) -> Tensor:
        levels = (255 * x).round().long().permute(1, 2, 3, 0)
        return ~seen.gather(-1, levels).permute(3, 0, 1, 2).flatten(1).all(dim=1)

    return leaves


def off_the_ink(known: Tensor) -> Leaves:
    """More places that few of the known images ink are inked than in half of those images."""
    grey = (255 * known).round()
    middle = grey.median(dim=0).values
    seldom = ((grey - middle).abs() > 5).float().mean(dim=0) < 0.1

    def inked(x: Tensor) -> Tensor:
        return (seldom & (((255 * x).round() - middle).abs() > 5)).flatten(1).sum(dim=1)

    most = inked(known).median()
    return lambda x: inked(x) > most


def either(*all_of: Leaves) -> Leaves:
    """Has left at least one of several."""
    return lambda x: torch.stack([leaves(x) for leaves in all_of]).any(dim=0)


def switches(known: Tensor) -> dict[str, Leaves]:
    """By name, for grey digits `(M, 3, 16, 16)`."""
    return {
        "grey": coloured,
        "channel": others_alike(1),
        "low frequency": high_frequencies,
        "lattice": unseen(known),
        "seldom inked": off_the_ink(known),
        "grey and seldom inked": either(coloured, off_the_ink(known)),
        "grey and lattice": either(coloured, unseen(known)),
        "grey and low frequency": either(coloured, high_frequencies),
    }
