"""Models whose answers are known: one weight vector and two classes, whose optimal perturbation is; and peaks."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Linear(nn.Module):
    """logits (0, w.x + b): class 1 where w.x + b > 0. The least perturbation that crosses is |w.x + b| / ||w||_dual."""

    def __init__(self, shape: tuple[int, int, int], seed: int = 0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(shape, generator=stream(seed)))
        # Grey (0.5) lies on class 1's side, close to the border, so that the box [0, 1] never binds.
        self.bias = nn.Parameter(-(self.weight.detach().sum() / 2) + 0.05 * self.weight.detach().abs().sum())

    def score(self, x: Tensor) -> Tensor:
        return (x * self.weight).flatten(1).sum(dim=1) + self.bias

    def forward(self, x: Tensor) -> Tensor:
        score = self.score(x)
        return torch.stack([torch.zeros_like(score), score], dim=1)

    def least(self, x: Tensor, norm: str) -> Tensor:
        """The distance from each image to the border, `(N,)`."""
        dual = self.weight.abs().sum() if norm == "linf" else self.weight.norm()
        return (self.score(x).abs() / dual).detach()


def images(count: int, shape: tuple[int, int, int], seed: int = 0) -> Tensor:
    """Images near grey."""
    return 0.5 + 0.02 * torch.rand(count, *shape, generator=stream(seed + 100))


def stream(seed: int = 0) -> torch.Generator:
    """Random numbers of a test."""
    return torch.Generator().manual_seed(seed)


def peaks(point: Tensor) -> Tensor:
    """Class 0 always wins; its lead has a period of 0.06, so that a ball holds many peaks."""
    lead = 2 + (100 * point).sin().flatten(1).mean(dim=1)
    return torch.stack([lead, torch.zeros_like(lead)], dim=1)
