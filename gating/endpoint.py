"""A live endpoint as the gate asks it: by questions alone, and no more of them than its budget."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dfmcl.common.errors import DfmclError
from dfmcl.gating.verdict import EXIT_CODES
from dfmcl.robustness.contract import InputContract

Predict = Callable[[NDArray[np.uint8]], NDArray[np.float32]]
"""uint8 images (N, H, W, C) to logits (N, K), by questions to the subject."""


class Described(Protocol):
    """What an endpoint says of itself; input_shape is (H, W, C) of uint8 images."""

    @property
    def model(self) -> str: ...
    @property
    def version(self) -> str: ...
    @property
    def input_shape(self) -> tuple[int, int, int]: ...
    @property
    def labels(self) -> tuple[str, ...]: ...


Connect = Callable[[str, str], tuple[Described, Predict]]
"""URL (host:port) and model to an endpoint's description and its `predict`."""


class QueriesSpent(DfmclError):
    """The next question would exceed the budget of queries; nothing of it was asked."""

    exit_code = EXIT_CODES["inconclusive"]


class Asked:
    """The decider behind an endpoint: counts the images it was asked for, and never asks for more than its budget."""

    def __init__(self, predict: Predict, contract: InputContract, budget: int, where: str) -> None:
        self.budget, self.spent = budget, 0
        self._predict, self._contract, self._where = predict, contract, where

    def __call__(self, x: Tensor) -> Tensor:
        if self.spent + len(x) > self.budget:
            raise QueriesSpent(
                f"{self._where}: {self.spent} of {self.budget} queries are spent, {len(x)} more were wanted;"
                " allow more, or fewer images"
            )
        self.spent += len(x)  # before the answer: a request that fails was made
        return torch.from_numpy(np.asarray(self._predict(self._contract.wire(x.cpu()).numpy()), dtype=np.float32))
