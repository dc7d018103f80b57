"""Random numbers of one training step, the same for a batch as a whole and for a batch in parts."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Noise:
    """A step's stream. With `world` processes each draws for the whole batch and keeps its own part.

    So the batch sees the same numbers however many processes share it, at the price of drawing them `world` times.
    """

    generator: torch.Generator
    rank: int = 0
    world: int = 1

    def uniform(self, *shape: int) -> Tensor:
        """This part's draws from [0, 1): `shape`, with the part's number of images first."""
        return self.mine(torch.rand(shape[0] * self.world, *shape[1:], generator=self.generator, device=self.device))

    def mine(self, batch: Tensor) -> Tensor:
        """This part of something that has the whole batch in its first dimension."""
        size = len(batch) // self.world
        return batch[self.rank * size : (self.rank + 1) * size]

    @property
    def device(self) -> torch.device:
        return self.generator.device
