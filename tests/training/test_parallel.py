"""Two processes that train one network do what one process does."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from robustness.errors import BadInput
from robustness.runs import CHECKPOINT, load_run
from training.config import load_config
from training.learner import Learner
from training.parallel import Ranks
from training.train import train

ROOT = Path(__file__).parents[2]
CHANGES = [
    "model.width=4",
    "model.batch_norm=frozen",
    "data.train_images=120",
    "optimization.epochs=2",
    "optimization.batch_size=20",
    "optimization.optimizer=sgd",
    "optimization.lr=0.05",
    "optimization.ema=0.9",
    "optimization.awp=0.005",
    "curriculum.steps=2",
    "heldout.images=20",
    "masking.rule=ranked",
]


def torchrun(*arguments: str, processes: int = 2) -> subprocess.CompletedProcess[str]:
    """A real torchrun with gloo on this machine; one thread each."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launch = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={processes}"]
    launch += ["--master-addr=127.0.0.1", f"--master-port={port}", "-m", "training.train", *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    return subprocess.run(launch, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240, check=False)


def test_two_processes_train_the_network_of_one(tmp_path: Path) -> None:
    """Same global batch, frozen batch norm: weights agree within float32's tolerance; only the first process writes."""
    overrides = [part for change in CHANGES for part in ("--set", change)]
    both = torchrun("quickstart", *overrides, "--out", str(tmp_path / "two"))
    assert both.returncode == 0, both.stderr[-2000:]
    assert both.stdout.count("epoch 2/2") == 1
    train(load_config("quickstart", CHANGES), tmp_path / "one", log=lambda line: None)
    two, one = (load_file(tmp_path / name / CHECKPOINT) for name in ("two", "one"))
    start = Learner(load_config("quickstart", CHANGES), load_run(tmp_path / "one").model, 1, alone()).model.state_dict()
    assert set(start) == set(one)
    for name, ours in one.items():
        assert torch.allclose(ours.float(), two[name].float(), rtol=1e-3, atol=2e-4), name
    assert load_run(tmp_path / "one").manifest["result"]["alpha"] == pytest.approx(
        load_run(tmp_path / "two").manifest["result"]["alpha"], rel=1e-3
    )


def test_per_process_statistics_meet(tmp_path: Path) -> None:
    """With batch norm in training mode the run goes through, and both processes evaluate one and the same network."""
    changes = [change for change in CHANGES if "frozen" not in change]
    overrides = [part for change in [*changes, "optimization.epochs=1"] for part in ("--set", change)]
    both = torchrun("quickstart", *overrides, "--out", str(tmp_path / "run"))
    assert both.returncode == 0, both.stderr[-2000:]
    assert load_run(tmp_path / "run").manifest["result"]["step"] == 6


def alone() -> Ranks:
    return Ranks(0, 1, torch.device("cpu"))


def test_impossible_divisions_are_named(tmp_path: Path) -> None:
    """A batch that the processes cannot share, and synchronised statistics without GPUs, are bad input."""
    two = Ranks(0, 2, torch.device("cpu"))
    train(load_config("quickstart", [*CHANGES, "optimization.epochs=1"]), tmp_path / "run", log=lambda line: None)
    model = load_run(tmp_path / "run").model
    with pytest.raises(BadInput, match=r"optimization\.batch_size: 15 is no multiple of 2"):
        Learner(load_config("quickstart", [*CHANGES, "optimization.batch_size=15"]), model, 1, two)
    with pytest.raises(BadInput, match=r"model\.batch_norm: synchronised needs GPUs"):
        Learner(load_config("quickstart", [*CHANGES, "model.batch_norm=synchronised"]), model, 1, two)
