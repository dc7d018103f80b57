"""What makes a gradient of one network count on another: views of the input, smoothing, tuning; and several as one.

Each transform takes the pass that an attack climbs by, and returns another one; `attacks.climb` does the climbing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from robustness.geometry import start
from robustness.threat import Threat

Pass = Callable[[Tensor, Tensor, bool], tuple[Tensor, Tensor, Tensor]]
"""Points `(N, C, H, W)`, labels `(N,)`, whether a gradient is wanted: loss `(N,)`, its gradient, logits `(N, K)`."""

Transform = Callable[[Pass, Threat, torch.Generator], Pass]

SMALLEST, CHANGED = (
    0.9,
    0.5,
)  # the least size of a view, and how often there is one: 299 of 330 pixels and p of the paper
KERNEL = 7  # pixels of its side; of 3, 5, 7 and 15 the paper's 15 of 299 pixels is the weakest on 32
WITHIN, SAMPLES = 1.5, 20  # beta and N of the paper


class MeanLogits(nn.Module):
    """Several classifiers as one: the mean of their logits."""

    def __init__(self, models: Sequence[nn.Module]) -> None:
        super().__init__()
        self.models = nn.ModuleList(models)

    def forward(self, x: Tensor) -> Tensor:
        """x: (N, C, H, W) in [0, 1]; returns logits (N, K)."""
        return torch.stack([model(x) for model in self.models]).mean(dim=0)


def ensemble(models: Sequence[nn.Module]) -> nn.Module:
    """One model to craft on. Logits rather than losses are averaged: the stronger of the two in Dong et al. 2018."""
    return models[0] if len(models) == 1 else MeanLogits(models)


def diverse(look: Pass, threat: Threat, generator: torch.Generator) -> Pass:
    """Every other image, at random, is looked at smaller and elsewhere, on black: DI, Xie et al. 2019.

    The paper enlarges and pads; a network for one size of images gets that size here. Bilinear, each image its own view.
    """

    def changed(points: Tensor, y: Tensor, with_gradient: bool) -> tuple[Tensor, Tensor, Tensor]:
        count = len(points)
        draw = torch.rand(4, count, generator=generator, device=points.device, dtype=points.dtype)
        size = torch.where(draw[0] < CHANGED, 1 - (1 - SMALLEST) * draw[1], 1)
        across, down = (1 - size) * (2 * draw[2:] - 1)  # where the middle goes; the whole width is 2
        nought = torch.zeros_like(size)
        rows = [
            torch.stack(row, dim=1) for row in ((1 / size, nought, -across / size), (nought, 1 / size, -down / size))
        ]
        grid = functional.affine_grid(torch.stack(rows, dim=1), list(points.shape), align_corners=False)
        with torch.set_grad_enabled(with_gradient):
            before = points.detach().requires_grad_(with_gradient)
            view = functional.grid_sample(before, grid, align_corners=False)
        value, gradient, logits = look(view.detach(), y, with_gradient)
        if with_gradient:
            (gradient,) = torch.autograd.grad(view, before, gradient)
        return value, gradient, logits

    return changed


def smoothed(look: Pass, threat: Threat, generator: torch.Generator) -> Pass:
    """The gradient blurred, as if the image were looked at from places around it: TI, Dong et al. 2019.

    By a Gaussian kernel that is cut at three of its standard deviations.
    """

    def changed(points: Tensor, y: Tensor, with_gradient: bool) -> tuple[Tensor, Tensor, Tensor]:
        value, gradient, logits = look(points, y, with_gradient)
        return value, blurred(gradient), logits

    return changed


def blurred(images: Tensor) -> Tensor:
    """Each channel of `(N, C, H, W)` under the Gaussian kernel; nothing beyond the border."""
    line = torch.linspace(-3, 3, KERNEL, device=images.device, dtype=images.dtype).square().div(-2).exp()
    line = (line / line.sum()).expand(images.shape[1], 1, 1, -1)
    across = functional.conv2d(images, line, padding=(0, KERNEL // 2), groups=images.shape[1])
    return functional.conv2d(across, line.transpose(2, 3), padding=(KERNEL // 2, 0), groups=images.shape[1])


def tuned(look: Pass, threat: Threat, generator: torch.Generator) -> Pass:
    """The gradient, and by how much those around the point before differed from its own: VMI, Wang & He 2021.

    A step costs SAMPLES + 1 passes. It remembers, so that a pass serves one climb of one batch.
    """
    around = Threat(threat.norm, WITHIN * threat.eps)
    difference: Tensor | None = None

    def changed(points: Tensor, y: Tensor, with_gradient: bool) -> tuple[Tensor, Tensor, Tensor]:
        nonlocal difference
        value, gradient, logits = look(points, y, with_gradient)
        if not with_gradient:
            return value, gradient, logits
        seen = gradient if difference is None else gradient + difference
        others = sum((look(start(points, around, generator), y, True)[1] for _ in range(SAMPLES)), -SAMPLES * gradient)
        difference = others / SAMPLES
        return value, seen, logits

    return changed


TRANSFORMS: dict[str, Transform] = {"di": diverse, "ti": smoothed, "vmi": tuned}
