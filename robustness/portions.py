"""How many images go through a network at once: as many as a budget of memory holds, and fewer where it runs out.

An attack draws and decides for a whole batch; only the passes are made in portions, so that the size of a portion
changes nothing but the last digits of sums.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from dfmcl.common.errors import lacks_memory

# Bytes that a backward pass may keep on a CPU. More is slower, because the system takes back each large tensor and
# hands it out anew: EfficientNet-Lite0 at 224 pixels keeps 50 MB an image; 4 at once take 70 ms each, 32 take 120 ms.
BUDGET = 2**27
SHARE = 4  # of a GPU's memory a quarter
# Values in images that are only asked about at once: 170 of 32 pixels, 3 of 224. EfficientNet-Lite0 answers 2 to 4 at
# once in 5.5 ms each, and 64 in 10 ms, which take 0.8 GB more.
ASKED = 2**19
ATTACKED = 2**21  # in images that are attacked together: 13 of 224 pixels; an attack holds ten copies of them

Work = Callable[[slice], tuple[Tensor, ...]]
"""What is done with some rows: tensors of so many rows."""


def portion(image: int, budget: int) -> int:
    """Images at once, where one takes `image` bytes of `budget`; at least one."""
    return max(1, budget // max(1, image))


def even(count: int, most: int) -> int:
    """The size of the first of as few, and as equal, portions of `count` images as `most` allows."""
    return -(-count // max(1, -(-count // most)))


class Portions:
    """Passes through one network. most: images at once; halved each time memory runs out, and kept so."""

    def __init__(self, most: int) -> None:
        self.most = most

    @staticmethod
    def of(network: nn.Module, example: Tensor) -> Portions:
        """By what autograd keeps of a pass over the first two images of `example` `(N, C, H, W)`."""
        few = example[:2]
        return Portions(portion(kept_bytes(network, few) // max(1, len(few)), budget_on(example.device)))

    def joined(self, work: Work, count: int) -> tuple[Tensor, ...]:
        """The work on `count` rows, in portions; its errors pass, unless memory ran out and a portion can shrink."""
        done: list[tuple[Tensor, ...]] = []
        begin = 0
        while begin < count or not done:
            size = even(count - begin, self.most)
            try:
                done.append(work(slice(begin, begin + size)))
                begin += size
                continue
            except Exception as error:
                if not lacks_memory(error) or size <= 1:
                    raise
            self.most = size // 2  # after the error is gone, which holds what the pass had taken
            if torch.cuda.is_initialized():
                torch.cuda.empty_cache()
        return done[0] if len(done) == 1 else tuple(torch.cat(column) for column in zip(*done, strict=True))


def kept_bytes(network: nn.Module, x: Tensor) -> int:
    """Bytes that a pass with gradients over images `(N, C, H, W)` takes: what autograd keeps, the images twice."""
    weights = {value.untyped_storage().data_ptr() for value in (*network.parameters(), *network.buffers())}
    held: dict[int, int] = {}

    def pack(value: Tensor) -> Tensor:
        held[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()
        return value

    with torch.enable_grad(), saved_tensors_hooks(pack, lambda value: value):
        logits = network(x.detach().requires_grad_())
    del logits  # until here it holds all that was counted, so that no place is counted twice
    return sum(size for place, size in held.items() if place not in weights) + 2 * x.nbytes


def budget_on(device: torch.device) -> int:
    """Bytes for the passes on a device: the same on each machine of its kind, whatever else runs there."""
    if device.type != "cuda":
        return BUDGET
    return int(torch.cuda.get_device_properties(device).total_memory) // SHARE


def portions_of(model: object, count: int) -> Portions:
    """Those that a model brings; all `count` images at once where it brings none."""
    found = getattr(model, "portions", None)
    return found if isinstance(found, Portions) else Portions(max(1, count))


def answered(decide: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Logits `(N, K)` float32 on the CPU for images `(N, C, H, W)`, without gradients; in portions on a CPU."""
    most = len(x) if x.is_cuda or not len(x) else portion(x[0].numel(), ASKED)
    with torch.no_grad():
        (logits,) = Portions(max(1, most)).joined(lambda rows: (decide(x[rows]).detach().float().cpu(),), len(x))
    return logits
