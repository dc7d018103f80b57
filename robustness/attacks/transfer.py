"""What makes a gradient of one network count on another: views of the input, smoothing, tuning; and several as one.

Each transform takes the pass that an attack climbs by, and returns another one; `attacks.climb` does the climbing.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from dfmcl.common.errors import BadInput
from dfmcl.robustness.threats.ball import Ball

Pass = Callable[[Tensor, Tensor, bool], tuple[Tensor, Tensor, Tensor]]
"""Points `(N, C, H, W)`, labels `(N,)`, whether a gradient is wanted: loss `(N,)`, its gradient, logits `(N, K)`."""

Transform = Callable[[Pass, Ball, torch.Generator], Pass]

SMALLEST = 0.9  # size of a view, at least: 299 of 330 pixels in the paper
CHANGED = 0.5  # p of the paper: how often there is a view, instead of the image
REACH = 40  # a kernel reaches over this part of the side: 15 of 299 pixels in the paper; 5 at least, to do anything
WITHIN = 1.5  # beta of the paper, in eps: how far around a point it is looked
SAMPLES = 5  # the paper's 20 cost 3.5 times as much, and as many of 200 CIFAR-10 images held: 126


class MeanLogits(nn.Module):
    """Several classifiers as one: the mean of their logits."""

    def __init__(self, models: Sequence[nn.Module]) -> None:
        super().__init__()
        self.models = nn.ModuleList(models)

    def forward(self, x: Tensor) -> Tensor:
        """x: (N, C, H, W) in [0, 1]; returns logits (N, K)."""
        return torch.stack([model(x) for model in self.models]).mean(dim=0)


def ensemble(models: Sequence[nn.Module]) -> nn.Module:
    """One model to craft on; BadInput for none.

    Logits rather than losses are averaged, the stronger of the two in Dong et al. 2018, section 3.3: the loss of a
    network that is fooled already would have the largest gradient.
    """
    if not models:
        raise BadInput("ensemble: no surrogates; name at least one")
    return models[0] if len(models) == 1 else MeanLogits(models)


def ensemble_sha256(checkpoints: Sequence[str]) -> str:
    """What names an ensemble: a checkpoint's own SHA-256 where it is alone, else one of all, in whatever order."""
    if len(checkpoints) == 1:
        return checkpoints[0]
    return hashlib.sha256("".join(sorted(checkpoints)).encode()).hexdigest()


def diverse(look: Pass, threat: Ball, generator: torch.Generator) -> Pass:
    """Every other image, at random, is looked at smaller and elsewhere, on black: DI, Xie et al. 2019.

    The paper enlarges and pads; a network for one size of images gets that size here. Bilinear; each image has its own.
    """

    def changed(points: Tensor, y: Tensor, with_gradient: bool) -> tuple[Tensor, Tensor, Tensor]:
        count = len(points)
        if not count:  # torch makes no grid for no images
            return look(points, y, with_gradient)
        draw = torch.rand(4, count, generator=generator, device=points.device, dtype=points.dtype)
        size = 1 - (1 - SMALLEST) * draw[1]
        across, down = (1 - size) * (2 * draw[2:] - 1)  # where the middle goes; the whole width is 2
        nought = torch.zeros_like(size)
        rows = [
            torch.stack(row, dim=1) for row in ((1 / size, nought, -across / size), (nought, 1 / size, -down / size))
        ]
        grid = functional.affine_grid(torch.stack(rows, dim=1), list(points.shape), align_corners=False)
        with torch.set_grad_enabled(with_gradient):
            before = points.detach().requires_grad_(with_gradient)
            view = functional.grid_sample(before, grid, align_corners=False)
            view = torch.where((draw[0] < CHANGED).view(-1, 1, 1, 1), view, before)
        value, gradient, logits = look(view.detach(), y, with_gradient)
        if with_gradient:
            (gradient,) = torch.autograd.grad(view, before, gradient)
        return value, gradient, logits

    return changed


def smoothed(look: Pass, threat: Ball, generator: torch.Generator) -> Pass:
    """The gradient blurred, as if the image were looked at from places around it: TI, Dong et al. 2019.

    By a Gaussian kernel that is cut at three of its standard deviations. On images of 32 pixels it adds nothing: from
    two surrogates at 8/255, the shipped ResNet-18 held on 128 of 200 images, with 15 pixels on 138, without it on 127.
    """

    def changed(points: Tensor, y: Tensor, with_gradient: bool) -> tuple[Tensor, Tensor, Tensor]:
        value, gradient, logits = look(points, y, with_gradient)
        return value, blurred(gradient), logits

    return changed


def blurred(images: Tensor) -> Tensor:
    """Each channel of `(N, C, H, W)` under the Gaussian kernel; nothing beyond the border."""
    channels, reach = images.shape[1], max(2, round(min(images.shape[2:]) / REACH))
    line = torch.linspace(-3, 3, 2 * reach + 1, device=images.device, dtype=images.dtype).square().div(-2).exp()
    line = (line / line.sum()).expand(channels, 1, 1, -1)
    across = functional.conv2d(images, line, padding=(0, reach), groups=channels)
    return functional.conv2d(across, line.transpose(2, 3), padding=(reach, 0), groups=channels)


def tuned(look: Pass, threat: Ball, generator: torch.Generator) -> Pass:
    """The gradient, and by how much those around the point before differed from its own: VMI, Wang & He 2021.

    They are asked when the next step needs them: T steps cost T + (T - 1) * SAMPLES passes. It remembers the point
    before, so that a pass serves one climb of one batch.
    """
    around = threat.sized(WITHIN * threat.eps)
    before: tuple[Tensor, Tensor] | None = None

    def changed(points: Tensor, y: Tensor, with_gradient: bool) -> tuple[Tensor, Tensor, Tensor]:
        nonlocal before
        value, gradient, logits = look(points, y, with_gradient)
        if not with_gradient:
            return value, gradient, logits
        difference = torch.zeros_like(gradient)
        if before is not None:
            point, there = before
            for _ in range(SAMPLES):
                difference += (look(around.start(point, generator), y, True)[1] - there) / SAMPLES
        before = points, gradient
        return value, gradient + difference, logits

    return changed


TRANSFORMS: dict[str, Transform] = {"di": diverse, "ti": smoothed, "vmi": tuned}
