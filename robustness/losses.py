"""Losses an attacker climbs, per image: `(N, K)` logits and `(N,)` labels to `(N,)`. Larger is worse."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def cross_entropy(logits: Tensor, y: Tensor) -> Tensor:
    """-log softmax(logits)[y]."""
    return functional.cross_entropy(logits, y, reduction="none")


def margin(logits: Tensor, y: Tensor) -> Tensor:
    """max_{j != y} z_j - z_y: positive exactly where the image is misclassified. Carlini & Wagner 2017, f6."""
    own = logits.gather(1, y[:, None]).squeeze(1)
    others = logits.scatter(1, y[:, None], float("-inf")).amax(dim=1)
    return others - own


def dlr(logits: Tensor, y: Tensor) -> Tensor:
    """Difference of logits ratio: the margin divided by z_(1) - z_(3), so that rescaling logits changes nothing.

    Croce & Hein 2020 (AutoAttack), equation 6. Needs K >= 3.
    """
    top = logits.topk(3, dim=1).values
    return margin(logits, y) / (top[:, 0] - top[:, 2]).clamp_min(1e-12)


def kl(logits: Tensor, reference_logits: Tensor) -> Tensor:
    """KL(softmax(reference) || softmax(logits)) per image, the TRADES surrogate. Both `(N, K)`."""
    reference = torch.log_softmax(reference_logits, dim=1)
    return (reference.exp() * (reference - torch.log_softmax(logits, dim=1))).sum(dim=1)
