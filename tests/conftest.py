"""Runs that many tests look at: really trained, in seconds."""

from __future__ import annotations

import os
import signal
from pathlib import Path

# Before torch loads: OpenMP threads that spin while they wait make a forward pass up to 100 times slower beside a busy
# process, and tests start servers. 3,000 spins cost 15 % on an idle machine, sleeping at once would cost 50 %.
os.environ.setdefault("GOMP_SPINCOUNT", "3000")
# `make test` runs three processes; what they start must not want two cores each, and equals a run in here bit for bit.
os.environ["OMP_NUM_THREADS"] = "1"

# A shell that runs us in the background lets us ignore SIGINT, and so would every server that a test interrupts.
signal.signal(signal.SIGINT, signal.default_int_handler)

import pytest
import torch
from hypothesis import settings

from training.config import load_config
from training.train import train

# The same everywhere, as results depend on the order of float sums. One: processes with two threads each wait for
# each other on two cores, and take more than twice as long.
torch.set_num_threads(1)
# How long an example takes depends on what else runs, and is nothing that a test states by the way.
settings.register_profile("patient", deadline=None)
settings.load_profile("patient")

# They take minutes; begun last, they would leave the other processes with nothing to do.
LONG = (
    "test_readme.py", "test_strength.py", "test_gate.py", "test_alarms.py", "test_supervisor.py", "test_pipelines.py",
    "test_train.py", "test_distribution.py", "test_page.py", "test_platform.py",
)  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Long files first, the longest before all."""
    items.sort(key=lambda item: LONG.index(item.path.name) if item.path.name in LONG else len(LONG))


TINY = ["model.width=8", "data.train_images=600", "optimization.epochs=5"]


@pytest.fixture(scope="session")
def standard_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A plain narrow network on digits: about 80 % clean, nothing under attack."""
    out = tmp_path_factory.mktemp("runs") / "standard"
    train(load_config("quickstart_standard", TINY), out, log=lambda line: None)
    return out


@pytest.fixture(scope="session")
def other_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another seed of the same."""
    out = tmp_path_factory.mktemp("runs") / "other"
    train(load_config("quickstart_standard", [*TINY, "seed=1"]), out, log=lambda line: None)
    return out
