"""How hard training is at step t: the radius S(t), and which attack is drawn."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from robustness.attacks import fgsm, margin_pgd, pgd
from robustness.seeds import generator

TrainingAttack = Callable[..., Tensor]


def strength(step: int, total_steps: int, beta: float, schedule: str = "linear") -> float:
    """S(t) = beta * t / T for step t in 1..T ("linear"), or beta throughout ("constant"). Pixel units."""
    return beta if schedule == "constant" else beta * step / total_steps


def draw(pool: Sequence[str], seed: int, step: int) -> str:
    """The attack of step t, uniformly from the pool; the same seed and step give the same answer."""
    stream = generator(seed, "attack choice", step)
    return pool[int(torch.randint(len(pool), (1,), generator=stream))]


def training_attack(name: str, steps: int) -> TrainingAttack:
    """An attack as training needs it: the last iterate, no image leaves the batch."""
    kinds: dict[str, TrainingAttack] = {
        "fgsm": fgsm,
        "pgd": partial(pgd, steps=steps, keep="last"),
        "cw": partial(margin_pgd, steps=steps, keep="last"),  # the margin loss of C&W inside the eps-ball
    }
    return kinds[name]
