"""An exponential moving average of a network: weights and batch-norm statistics alike."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn


class MovingAverage(nn.Module):
    """average <- d * average + (1 - d) * network after each step, d = min(decay, (1 + n) / (10 + n)) at the n-th.

    The ramp keeps the first weights from weighing for ever (as in TensorFlow's ExponentialMovingAverage). Batch norm's
    running statistics are averaged too, for they must fit the weights; counters are copied.
    """

    updates: Tensor

    def __init__(self, network: nn.Module, decay: float) -> None:
        super().__init__()
        self.network = copy.deepcopy(network).requires_grad_(False).eval()
        self.decay = decay
        self.register_buffer("updates", torch.tensor(0))
        self._count = 0

    @torch.no_grad()
    def update(self, network: nn.Module) -> None:
        """Move towards the network by one step."""
        self._count += 1
        weight = 1 - min(self.decay, (1 + self._count) / (10 + self._count))
        self.updates.fill_(self._count)
        ours, theirs = list(self.network.state_dict().values()), list(network.state_dict().values())
        floats = [index for index, tensor in enumerate(ours) if tensor.is_floating_point()]
        torch._foreach_lerp_([ours[i] for i in floats], [theirs[i] for i in floats], weight)
        for index in set(range(len(ours))) - set(floats):
            ours[index].copy_(theirs[index])

    @torch.no_grad()
    def restart(self, network: nn.Module) -> None:
        """Forget the past: the average is the network."""
        self._count = 0
        self.updates.zero_()
        self.network.load_state_dict(network.state_dict())

    def load_state_dict(self, *arguments: Any, **options: Any) -> Any:
        result = super().load_state_dict(*arguments, **options)
        self._count = int(self.updates)  # on the host, so that a step on a GPU waits for nothing
        return result
