"""Losses an attacker climbs, per image: `(N, K)` logits and `(N,)` labels to `(N,)`. Larger is worse."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from dfmcl.common.errors import BadInput
from dfmcl.robustness.portions import portions_of

TINY = 1e-12  # keeps a ratio finite where all logits are equal


def cross_entropy(logits: Tensor, y: Tensor) -> Tensor:
    """-log softmax(logits)[y]."""
    return functional.cross_entropy(logits, y, reduction="none")


def margin(logits: Tensor, y: Tensor) -> Tensor:
    """max_{j != y} z_j - z_y: positive exactly where the image is misclassified. Carlini & Wagner 2017, f6."""
    own = logits.gather(1, y[:, None]).squeeze(1)
    others = logits.scatter(1, y[:, None], float("-inf")).amax(dim=1)
    return others - own


def right(logits: Tensor, y: Tensor) -> Tensor:
    """Whether each image is classified right, `(N,)` bool. Logits that are not finite are no answer, so wrong."""
    return (logits.argmax(dim=1) == y) & logits.isfinite().all(dim=1)


def value_and_gradient(
    model: Callable[[Tensor], Tensor],
    x: Tensor,
    loss: Callable[..., Tensor],
    labels: tuple[Tensor, ...],
    with_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """loss(logits at x, *labels) per image `(N,)`, its gradient in x (zeros where none was asked for), the logits.

    labels: of the images, `(N,)` each. In the model's portions, so that memory does not grow with the batch.
    """

    def part(rows: slice) -> tuple[Tensor, Tensor, Tensor]:
        with torch.set_grad_enabled(with_gradient):
            point = x[rows].detach().requires_grad_(with_gradient)
            logits = model(point)
            value = loss(logits, *(label[rows] for label in labels))
            gradient = torch.autograd.grad(value.sum(), point)[0] if with_gradient else torch.zeros_like(point)
        return value.detach(), gradient, logits.detach()

    value, gradient, logits = portions_of(model, len(x)).joined(part, len(x))
    return value, gradient, logits


def targeted_margin(logits: Tensor, y: Tensor, target: Tensor) -> Tensor:
    """z_t - z_y, target `(N,)` a class other than y: negative where t is no nearer than y."""
    return (logits.gather(1, target[:, None]) - logits.gather(1, y[:, None])).squeeze(1)


def targeted_dlr(logits: Tensor, y: Tensor, target: Tensor) -> Tensor:
    """(z_t - z_y) / (z_1st - (z_3rd + z_4th) / 2), target `(N,)` a class other than y. Croce & Hein 2020, eq. 7.

    Needs K >= 4, else BadInput.
    """
    if logits.shape[1] < 4:
        raise BadInput(
            f"targeted DLR: the model has {logits.shape[1]} classes, at least 4 are needed; attack with apgd-ce"
        )
    first, _, third, fourth = logits.topk(4, dim=1).values.unbind(dim=1)
    return targeted_margin(logits, y, target) / (first - (third + fourth) / 2 + TINY)
