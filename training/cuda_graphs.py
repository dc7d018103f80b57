"""CUDA graphs: the kernels of a network's pass, recorded once and launched together.

A GPU is done with a batch of 256 small images long before Python has launched a ResNet-18's kernels for the next.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

from dfmcl.common.errors import BadInput, Broken, lacks_memory

Pass = Callable[[Tensor], Tensor]


class _Module(nn.Module):
    """A pass as a module that has the network's parameters: gradients in these are recorded too."""

    def __init__(self, network: nn.Module, function: Pass) -> None:
        super().__init__()
        self.network, self.function = network, function
        self.training = network.training

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def recorded(network: nn.Module, function: Pass, example: Tensor, autocast: AbstractContextManager[Any]) -> Pass:
    """`function`, a forward pass of the network, as a CUDA graph, and its backward pass as another.

    example: images `(N, C, H, W)` such as all later ones, requiring a gradient where these do. autocast: without its
    cache of weights, which inside a graph would be kept for ever. A result is overwritten by the next call, so its
    backward pass must come before. Weights may change in place.
    """
    buffers = [buffer.clone() for buffer in network.buffers()]
    try:
        with autocast, _fastest_convolutions():
            graphed = torch.cuda.make_graphed_callables(_Module(network, function), (example,), allow_unused_input=True)
    except RuntimeError as error:
        if lacks_memory(error):
            advice = "train with a smaller --set optimization.batch_size"
            raise BadInput(f"CUDA graph: the GPU's memory is full; {advice}") from None
        raise Broken(f"CUDA graph: {error}; train without, with --set optimization.graphs=never") from None
    with torch.no_grad():  # the passes that recorded it were none of training's
        for buffer, value in zip(network.buffers(), buffers, strict=True):
            buffer.copy_(value)
    return cast(Pass, graphed)


@contextmanager
def _fastest_convolutions() -> Iterator[None]:
    """Inside, cuDNN looks for the fastest algorithm of each convolution; worth it where all batches have one shape."""
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = True
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before
