"""Measuring: full precision decides, and what is measured is kept."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from dfmcl.robustness.models import exactly
from dfmcl.training.measurement import Partial


def test_deciding_puts_tf32_back() -> None:
    """The setting is off while the network decides, and as it was afterwards."""
    seen = []

    class Network(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            seen.append(torch.backends.cudnn.allow_tf32)
            return x

    before = torch.backends.cudnn.allow_tf32
    exactly(Network())(torch.zeros(1))
    assert seen == [False]
    assert torch.backends.cudnn.allow_tf32 == before


def test_partial_is_saved_whatever_ends_the_work(tmp_path: Path) -> None:
    """An exception inside loses no batch."""
    partial = Partial(tmp_path / "x.json", "a")

    def fail() -> None:
        with partial.kept():
            partial.add("key", {"held": "1"})
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert Partial(tmp_path / "x.json", "a").batches == {"key": [{"held": "1"}]}
    assert Partial(tmp_path / "x.json", "b").batches == {}
