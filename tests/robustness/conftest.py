"""A network that resists: small, really trained, robust on about half of its images."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dfmcl.robustness.data import load_dataset
from dfmcl.robustness.models import Classifier, to_float
from dfmcl.robustness.runs import load_run
from tests.networks import Networks


@pytest.fixture(scope="session")
def hardened(networks: Networks) -> Classifier:
    """PGD-2 training of a narrow ResNet-18 on digits, up to 16/255; frozen."""
    model = load_run(networks("hardened")).model.eval()
    model.requires_grad_(False)
    return model


@pytest.fixture(scope="session")
def digits() -> tuple[Tensor, Tensor]:
    """200 test images `(200, 3, 16, 16)` and their labels."""
    data = load_dataset("digits")
    # Contiguous: torchattacks' FAB takes no other layout.
    return to_float(torch.from_numpy(data.x_test[:200])).contiguous(), torch.from_numpy(data.y_test[:200])
