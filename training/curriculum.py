"""How hard training is at step t: the radius S(t), the number of attack steps, and which attack is drawn."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from dfmcl.robustness.seeds import generator


def progress(step: int, total_steps: int, warmup: float = 0.0, hold: float = 0.0) -> float:
    """How much of the ramp is done at step t in 1..T: 0 in the first `warmup` share, 1 in the last `hold` share."""
    return min(max((step / total_steps - warmup) / (1 - warmup - hold), 0.0), 1.0)


def strength(
    step: int, total_steps: int, beta: float, schedule: str = "linear", warmup: float = 0.0, hold: float = 0.0
) -> float:
    """S(t) in pixel units: beta * t / T as the source has it ("linear"), a half cosine, or beta throughout.

    warmup and hold are the shares of the run before and after the ramp ("constant" has none).
    """
    if schedule == "constant":
        return beta
    done = progress(step, total_steps, warmup, hold)
    return beta * (done if schedule == "linear" else 0.5 * (1 - math.cos(math.pi * done)))


def attack_steps(first: int, last: int, done: float) -> int:
    """Steps of an iterative attack, growing from `first` to `last` (0: they stay) in equal parts of the ramp."""
    return first if last == 0 else first + round((last - first) * done)


def draw(pool: Sequence[str], seed: int, step: int, weights: Sequence[float] = ()) -> str:
    """The attack of step t, by weight (none: uniformly); the same seed and step give the same answer."""
    chances = torch.tensor(weights or [1.0] * len(pool), dtype=torch.float64)
    return pool[int(torch.multinomial(chances, 1, generator=generator(seed, "attack choice", step)))]
