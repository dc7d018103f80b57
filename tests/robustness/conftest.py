"""A network that resists: small, really trained, robust on about half of its images."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from robustness.data import load_dataset
from robustness.models import Classifier, to_float
from robustness.runs import load_run
from training.config import load_config
from training.train import train

SMALL = ["model.width=8", "optimization.epochs=8", "curriculum.beta=16/255", "curriculum.steps=2"]


@pytest.fixture(scope="session")
def hardened(tmp_path_factory: pytest.TempPathFactory) -> Classifier:
    """PGD-2 training of a narrow ResNet-18 on digits, up to 16/255; frozen."""
    out = tmp_path_factory.mktemp("hardened") / "run"
    train(load_config("quickstart_surrogate", [*SMALL, "heldout.attack_steps=1"]), out, log=lambda line: None)
    model = load_run(out).model.eval()
    model.requires_grad_(False)
    return model


@pytest.fixture(scope="session")
def digits() -> tuple[Tensor, Tensor]:
    """200 test images `(200, 3, 16, 16)` and their labels."""
    data = load_dataset("digits")
    # Contiguous: torchattacks' FAB takes no other layout.
    return to_float(torch.from_numpy(data.x_test[:200])).contiguous(), torch.from_numpy(data.y_test[:200])
