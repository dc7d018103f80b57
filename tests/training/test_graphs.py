"""On a GPU: passes that are recorded as CUDA graphs train as those that are launched one by one."""

from __future__ import annotations

import copy
from collections.abc import Mapping

import pytest
import torch
from torch import Tensor

from dfmcl.robustness.models import Classifier, ModelSpec
from dfmcl.robustness.ranks import Ranks
from dfmcl.training.config import TrainConfig
from dfmcl.training.learner import Learner

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

State = Mapping[str, Tensor]
CONFIG = {
    "model": {"width": 16, "activation": "silu"},
    "masking": {"rule": "ranked", "rate": 0.1, "alpha": 0.5, "scaling": "inverted"},
    "curriculum": {"beta": "8/255", "attacks": ["kl"], "steps": 2},
    "objective": {"name": "trades", "views": 2, "view_augmentation": "crop-flip"},
    "optimization": {"batch_size": 32, "optimizer": "sgd", "lr": 0.01, "awp": 0.005, "awp_start": 0.5, "ema": 0.9},
}


@pytest.mark.parametrize("objective", ["ce", "trades"])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_recorded_passes_train_as_launched_ones(objective: str, precision: str) -> None:
    """Losses, updates and running statistics over updates without and with weight perturbation."""
    random = torch.Generator().manual_seed(1)
    images = torch.randint(256, (32, 32, 32, 3), generator=random, dtype=torch.uint8).cuda()
    labels = torch.randint(10, (32,), generator=random).cuda()
    learners, losses = {}, {}
    for graphs in ("auto", "never"):
        config = TrainConfig.model_validate(
            CONFIG
            | {"objective": CONFIG["objective"] | {"name": objective}}
            | {"optimization": CONFIG["optimization"] | {"precision": precision, "graphs": graphs}}
        )
        torch.manual_seed(0)
        model = Classifier(ModelSpec("resnet18", 16, 10, (32, 32, 3), (0.5,) * 3, (0.25,) * 3, "silu"))
        before = copy.deepcopy(model.state_dict())
        learners[graphs] = Learner(config, model, 8, Ranks.alone("cuda"))
        losses[graphs] = [learners[graphs].update(images, labels, step).item() for step in range(1, 9)]
    near = 5e-3 if precision == "float32" else 5e-2  # convolutions are in TF32, their algorithms differ
    assert losses["auto"] == pytest.approx(losses["never"], rel=near)
    # bfloat16 differs from float32 by 0.14 (on a CPU); weights that do not move differ by 1.
    assert updates_differ_by(before, *(learners[graphs].model.state_dict() for graphs in ("auto", "never"))) < 0.5


def updates_differ_by(before: State, ours: State, theirs: State) -> float:
    """Of the norm of their update: weights together or running statistics, the worse; inf where a count is another."""
    counts, running = ([name for name in before if kind in name] for kind in ("num_batches_tracked", "running_"))
    if any(not torch.equal(ours[name], theirs[name]) for name in counts):
        return float("inf")
    shares = []
    for names in (running, sorted({*before} - {*running} - {*counts})):
        apart, moved = (
            torch.cat([(state[name].cpu() - origin[name].cpu()).flatten() for name in names]).norm().item()
            for state, origin in ((ours, theirs), (theirs, before))
        )
        shares.append(apart / moved)
    return max(shares)
