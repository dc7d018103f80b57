"""Logits of the same images, computed twice."""

from __future__ import annotations

import torch
from torch import Tensor


def apart(one: Tensor, other: Tensor) -> float:
    """The largest difference of two sets of logits, as a share of the largest logit; infinite where one is not finite.

    Not of 1 where all are smaller: a model may well answer in thousandths.
    """
    if one.shape != other.shape:
        return float("inf")
    difference = (one - other).abs().max() / one.abs().max().clamp_min(torch.finfo(torch.float32).tiny)
    return float(difference) if difference.isfinite() else float("inf")
