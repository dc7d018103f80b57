"""Finitely many transforms; the attacker picks one: trying all is exact, and a member can be replayed."""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING

from dfmcl.robustness.threats.threat import Threat

if TYPE_CHECKING:
    from torch import Tensor


class Transforms(Threat):
    """The image itself, and what each of `count` transforms makes of it, byte for byte."""

    @abstractmethod
    def count(self, shape: tuple[int, ...]) -> int:
        """How many transforms images `(C, H, W)` have."""

    @abstractmethod
    def transformed(self, images: Tensor, numbers: Tensor) -> Tensor:
        """Image i under transform numbers[i]: uint8 `(N, C, H, W)`, `(N,)` in [0, count) -> uint8 `(N, C, H, W)`.

        The same bytes whenever it is asked, whatever other images are in the batch.
        """

    def contains_uint8(self, adversarial: Tensor, images: Tensor) -> Tensor:
        """By replay: all transforms by turns, of the images that none has explained yet."""
        import torch

        inside = (adversarial == images).flatten(1).all(dim=1)
        for number in range(self.count(tuple(images.shape[1:]))):
            left = torch.nonzero(~inside).squeeze(1)
            if not len(left):
                break
            replayed = self.transformed(images[left], torch.full_like(left, number))
            inside[left] = (replayed == adversarial[left]).flatten(1).all(dim=1)
        return inside
