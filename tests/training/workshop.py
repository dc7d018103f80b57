"""What several tests of the trainer share: a tiny learner, a tiny campaign, records made by hand, a stop at will."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dfmcl.robustness.data import Dataset
from dfmcl.robustness.ranks import Ranks
from dfmcl.robustness.records import AttackRecord, Evaluation
from dfmcl.robustness.threats.registry import threat_of
from dfmcl.training.config import load_config
from dfmcl.training.learner import Learner
from dfmcl.training.run_record import RunRecord
from dfmcl.training.train import build

ALONE = Ranks(0, 1, torch.device("cpu"))
NARROW = ["model.width=4", "optimization.batch_size=12", "curriculum.steps=2"]
PLAIN = ["masking.enabled=false", "curriculum.schedule=constant", "curriculum.beta=8/255"]
TINY = """
title = "Tiny"
label = "small scale"
betas = ["8/255"]
seeds = [0]
images = 20
batch_size = 12
main = ["fgsm", "pgd-2"]
claims_eps = "8/255"
hyperscore = ["8/255"]
cost_of = "standard"
overrides = [
    "data.name=npz", "data.train_images=240", "data.heldout_images=30", "model.width=4", "optimization.epochs=2",
    "optimization.batch_size=20", "optimization.lr=5e-3", "heldout.images=10", "heldout.attack_steps=1",
    "curriculum.steps=1",
]

[methods.standard]
preset = "quickstart_standard"
claimed = { clean = 94.1, pgd-2 = 48.7 }

[methods.dfmcl]
preset = "quickstart"

[methods.surrogate]
preset = "quickstart_surrogate"
seeds = [7]
measured = false

[measurements.white]
eps = ["1/255", "8/255"]
attacks = ["fgsm", "pgd-2", { attack = "pgd-2", step_size = "eps/4" }]
cascade = true

[measurements.square]
eps = ["8/255"]
attacks = ["square-4"]
kind = "black-box"

[measurements.transfer]
eps = ["8/255"]
attacks = ["mi-fgsm-2"]
source = "surrogate"

[comparisons]
pairs = [["dfmcl", "standard"]]
eps = ["8/255"]
attacks = ["clean", "worst case"]
"""
THREAT = threat_of("linf", "8/255")


class StopAfter(threading.Event):
    """An event that is set from its n-th asking on: a signal that arrives at a known place."""

    def __init__(self, asked: int) -> None:
        super().__init__()
        self.left = asked

    def is_set(self) -> bool:
        self.left -= 1
        return self.left < 0


def quiet(line: str) -> None:
    """A log that nobody reads."""


def synthetic(
    method: str, seed: int, held: dict[str, np.ndarray[Any, Any]], alpha: float = 0.1, n: int = 100
) -> RunRecord:
    """A record whose PGD-2 flags at each radius are given; all clean images are right."""
    every = (True,) * n
    evaluations = tuple(
        Evaluation(
            threat_of("linf", eps),
            False,
            0,
            every,
            (AttackRecord("pgd-2", {}, tuple(flags.tolist()), every, 0, 1.0),),
            1.0,
            {"measurement": "white", "black_box": False},
        )
        for eps, flags in held.items()
    )
    row = {"epoch": 1, "alpha": alpha, "p_mean": 0.5, "p_std": 0.0, "p_low": 0.5, "p_high": 0.5}
    result = {"heldout_clean": 1.0, "heldout_pgd": 0.5}
    return RunRecord(
        name=f"{method}_beta8_seed{seed}",
        method=method,
        family=method.partition("-")[0],
        beta="8/255",
        seed=seed,
        identity="",
        status="done",
        config={"masking": {"enabled": True, "rule": "literal", "alpha": alpha}},
        about={
            "command": "dfmcl campaign x",
            "code": {"revision": ""},
            "versions": {"torch": "2"},
            "hardware": {"cpu": "c", "gpu": None, "threads": 2},
        },
        training={"history": [row], "result": result, "minutes": 1.0, "images_per_second": 10.0},
        evaluations=evaluations,
    )


def first_of(n: int, count: int) -> np.ndarray[Any, Any]:
    return np.arange(n) < count


def learner(digits: Dataset, *changes: str, total_steps: int = 20, dtype: torch.dtype = torch.float32) -> Learner:
    """The quickstart's, narrow, with changes of its config."""
    config = load_config("quickstart", [*NARROW, *changes])
    return Learner(config, build(config, digits).to(dtype), total_steps, ALONE)


def batch(digits: Dataset, number: int = 0, size: int = 12) -> tuple[Tensor, Tensor]:
    """The n-th images and labels of the training part."""
    chosen = slice(number * size, (number + 1) * size)
    return torch.from_numpy(digits.x_train[chosen]), torch.from_numpy(digits.y_train[chosen])
