"""What a diagnosis keeps of gradients and of attacks under way."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dfmcl.robustness import losses
from dfmcl.robustness.attacks.trial import Trial
from dfmcl.robustness.rules import STEPS
from dfmcl.robustness.threats.ball import Ball


@dataclass(frozen=True)
class Slopes:
    """Gradients at random points of the ball around the M images that are right.

    loss: of the cross-entropy, summed absolute values per image `(M,)`; NaN or inf where the gradient is not finite.
    predicted: the rate at which the margin should grow along its gradient's sign `(M,)`; 0 where there is no gradient.
    happened: the rate at which it does, over each of the steps `(M, S)`.
    """

    loss: Tensor
    predicted: Tensor
    happened: Tensor


class Traced(Trial):
    """A trial that also keeps the margin of every image at every point it was shown."""

    def __init__(self, trial: Trial, y: Tensor) -> None:
        super().__init__(y)
        self._trial, self._margins = trial, list[Tensor]()

    @property
    def margins(self) -> Tensor:
        """`(STEPS + 1, N)`, NaN where an image was not shown any more, on the CPU."""
        short = STEPS + 1 - len(self._margins)
        return torch.stack(self._margins + [torch.full_like(self._margins[0], torch.nan)] * short).cpu()

    def spend(self, rows: Tensor, *, forward: int = 0, backward: int = 0) -> None:
        self._trial.spend(rows, forward=forward, backward=backward)

    def look(self, rows: Tensor, points: Tensor, logits: Tensor, *, gradient: bool) -> Tensor:
        row = torch.full((len(self._y),), torch.nan, device=logits.device)
        row[rows] = losses.margin(logits.float(), self._y[rows])
        self._margins.append(row)
        return self._trial.look(rows, points, logits, gradient=gradient)


class Rescaled(nn.Module):
    """Logits times a factor: the same answers."""

    def __init__(self, model: nn.Module, factor: float) -> None:
        super().__init__()
        self.model, self.factor = model, factor

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.model(x)
        return self.factor * logits


def of_another_class(labels: Tensor, chosen: Tensor) -> Tensor:
    """For each image `chosen` the next one of another class `(n,)`; itself where all are of one class."""
    count = len(labels)
    steps = (chosen[:, None] + torch.arange(1, count + 1, device=chosen.device)) % count
    apart = labels[steps] != labels[chosen][:, None]
    return steps.gather(1, apart.int().argmax(dim=1, keepdim=True)).squeeze(1)


def on_grid(point: Tensor, x: Tensor, threat: Ball) -> Tensor:
    return threat.to_uint8(point, x).float() / 255
