"""Whom else the checks may ask, beside the model and its images."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from torch import nn

from dfmcl.robustness.data import Bytes, Labels


@dataclass(frozen=True)
class Background:
    """Whom else to ask, and how. What is missing is not checked.

    training: images uint8 `(n, H, W, C)` and labels `(n,)` of the part that the judged images are not of.
    others: networks beside the judged one, by name: where an attack crafted on them leads.
    recalled: images uint8 `(n, H, W, C)`, clean and attacked, and the logits `(n, K)` that decided about them.
    afresh: answers to uint8 images in a new process.
    state: what a module keeps, a digest by the place where it lies.
    largest: batch that may be asked.
    rounds: whether the judged file rounds where the model that gives gradients does not.
    """

    training: tuple[Bytes, Labels] | None = None
    others: Mapping[str, nn.Module] = field(default_factory=dict)
    recalled: tuple[Bytes, NDArray[np.float32]] | None = None
    afresh: Callable[[Bytes], NDArray[np.float32]] | None = None
    state: Callable[[], Mapping[str, str]] | None = None
    largest: int = 1025
    rounds: bool = False
