"""The classifier: its ResNet-18 is torchvision's, and commands that compute load nothing as large as torch besides."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torchvision.models import resnet18

from dfmcl.robustness.models import Classifier, ModelSpec

ROOT = Path(__file__).parents[2]


def spec(arch: str, width: int = 64) -> ModelSpec:
    return ModelSpec(arch, width, 7, (16, 16, 3), (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))


@pytest.mark.parametrize("training", [False, True])
def test_full_width_is_torchvisions_network(training: bool) -> None:
    """Same names, shapes and places; same logits to the bit from torchvision's modules behind the small stem."""
    ours, theirs = Classifier(spec("resnet18")), resnet18(num_classes=7)
    theirs.conv1, theirs.maxpool = nn.Conv2d(3, 64, 3, padding=1, bias=False), nn.Identity()
    theirs.load_state_dict(ours.net.state_dict())
    assert [name for name, _ in ours.net.named_modules()] == [name for name, _ in theirs.named_modules()]
    x = torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = theirs.train(training)(x)
        assert torch.equal(ours.train(training)(x), expected)
        assert training or torch.equal(ours.head(ours.features(x)), expected)


def test_features_are_those_of_any_resnet() -> None:
    """torchvision's ResNets have them too, other networks have not."""
    model = Classifier(spec("torchvision:resnet18")).eval()
    assert model.is_resnet
    x = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(model.head(model.features(x)), model(x))
    assert not Classifier(spec("torchvision:mobilenet_v3_small")).is_resnet


def test_initial_weights_of_a_seed_stay() -> None:
    """Every record names a seed, whose draws are those of the day when the records were made."""
    torch.manual_seed(0)
    drawn = Classifier(spec("resnet18", 4)).get_parameter("net.fc.weight")
    assert drawn[0, :4].tolist() == pytest.approx(INITIAL, abs=1e-6)


INITIAL = [0.136768, 0.131300, -0.027694, -0.164062]


def test_commands_load_no_library_in_vain() -> None:
    """torchvision and scipy.stats take as long to load as torch, and few commands need them."""
    modules = "dfmcl.training.train, dfmcl.gating.gate, dfmcl.monitoring.sidecar, dfmcl.robustness.measurements"
    code = f"import sys, {modules}; print(*sys.modules)"
    made = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    loaded = made.stdout.split()
    assert "torch" in loaded
    assert {"torchvision", "scipy.stats", "sympy", "sklearn", "matplotlib"} & set(loaded) == set()
