"""Two processes that train one network do what one process does."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from dfmcl.common.errors import BadInput, Interrupted
from dfmcl.common.locks import LOCK, held
from dfmcl.robustness.data import load_dataset
from dfmcl.robustness.ranks import Ranks
from dfmcl.robustness.runs import load_run
from dfmcl.training.config import load_config
from dfmcl.training.learner import Learner
from dfmcl.training.limits import Limits
from dfmcl.training.state import STATE
from dfmcl.training.train import build, train
from tests.processes import wait_until
from tests.training.workshop import StopAfter, batch, quiet

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


def torchrun(
    *arguments: str, program: Sequence[str] = ("-m", "dfmcl.training.train"), processes: int = 2
) -> subprocess.CompletedProcess[str]:
    """A real torchrun with gloo on this machine; one thread each."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launch = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={processes}"]
    launch += ["--master-addr=127.0.0.1", f"--master-port={port}", *program, *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "PYTHONPATH": str(ROOT)}
    return subprocess.run(launch, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240, check=False)


UPDATES = """
import sys, torch
from pathlib import Path
from dfmcl.robustness.ranks import Ranks
from tests.training.test_parallel import updated
ranks = Ranks.join()
torch.save(updated(ranks), Path(sys.argv[1]) / f"{ranks.rank}.pt")
ranks.leave()
"""


def updated(ranks: Ranks) -> dict[str, Tensor]:
    """Weights, their average and alpha after six updates in float64, where no sign of a gradient hangs on rounding."""
    data, config = load_dataset("digits"), load_config("quickstart", CHANGES)
    learner = Learner(config, build(config, data).double(), 12, ranks)
    for step in range(1, 7):
        learner.update(*batch(data, step, size=20), step)
    assert learner.average is not None
    average = {f"average.{name}": value for name, value in learner.average.network.state_dict().items()}
    return {**learner.model.state_dict(), **average, "alpha": learner.mask.alpha.detach()}


def test_two_processes_train_the_network_of_one(tmp_path: Path) -> None:
    """Attack, masks, weight perturbation and average: with one global batch and frozen batch norm nothing differs."""
    (tmp_path / "updates.py").write_text(UPDATES)
    both = torchrun(str(tmp_path), program=[str(tmp_path / "updates.py")])
    assert both.returncode == 0, both.stderr[-2000:]
    two, one = torch.load(tmp_path / "0.pt", weights_only=True), updated(alone())
    assert set(two) == set(one)
    for name, value in one.items():
        # Two halves of a sum differ from the whole by 1e-16; alpha is float32.
        assert torch.allclose(value, two[name], rtol=1e-5 if name == "alpha" else 0, atol=1e-9), name


def test_only_the_first_process_writes(tmp_path: Path) -> None:
    """By the user's command: one run is written, of as many steps as one process takes, and each epoch is told once."""
    overrides = [part for change in CHANGES for part in ("--set", change)]
    both = torchrun("quickstart", *overrides, "--out", str(tmp_path / "two"))
    assert both.returncode == 0, both.stderr[-2000:]
    assert both.stdout.count("epoch 2/2") == 1
    result = load_run(tmp_path / "two").manifest["result"]
    assert (result["epoch"], result["step"]) == (2, 12)


STATISTICS = """
import sys, torch
from pathlib import Path
from dfmcl.robustness.data import load_dataset
from tests.training.workshop import StopAfter, batch, quiet
from dfmcl.training.config import load_config
from dfmcl.training.learner import Learner
from dfmcl.robustness.ranks import Ranks
from dfmcl.training.train import build
ranks, data = Ranks.join(), load_dataset("digits")
config = load_config("quickstart", ["model.width=4", "optimization.batch_size=20", "curriculum.steps=1"])
learner = Learner(config, build(config, data), 10, ranks)
learner.update(torch.from_numpy(data.x_train[:20]), torch.from_numpy(data.y_train[:20]), 5)
torch.save(learner.model.state_dict(), Path(sys.argv[1]) / f"{ranks.rank}.pt")
ranks.leave()
"""


def test_per_process_statistics_meet(tmp_path: Path) -> None:
    """With batch norm in training mode each process sees its half; afterwards both hold one and the same network."""
    (tmp_path / "update.py").write_text(STATISTICS)
    both = torchrun(str(tmp_path), program=[str(tmp_path / "update.py")])
    assert both.returncode == 0, both.stderr[-2000:]
    one, two = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    assert one["net.bn1.running_mean"].abs().max() > 0
    for name, value in one.items():
        assert torch.equal(value, two[name]), name


def test_a_state_that_not_all_processes_see_is_named(tmp_path: Path) -> None:
    """Each node with a disk of its own: only the first process finds the state, and all end with the reason."""
    script = tmp_path / "resume.py"
    script.write_text(
        "import os, sys; sys.argv[sys.argv.index('--out') + 1] += os.environ['RANK']; "
        "from dfmcl.cli import main; main()"
    )
    overrides = [part for change in CHANGES for part in ("--set", change)]
    command = ["train", "quickstart", *overrides, "--out", str(tmp_path / "run")]
    config = load_config("quickstart", CHANGES)
    with pytest.raises(Interrupted):
        train(config, tmp_path / "run0", limits=Limits(StopAfter(3)), log=quiet)
    both = torchrun(*command, "--resume", program=[str(script)])
    assert both.returncode != 0
    assert both.stderr.count("the processes found different states there; use a directory that all nodes share") == 2
    assert not (tmp_path / "run1" / "checkpoint.safetensors").exists()


def test_two_trainings_of_several_processes_do_not_share_a_place(tmp_path: Path) -> None:
    """Another process holds the run: all processes of the second end with its line, and what is there stays."""
    overrides = [part for change in CHANGES for part in ("--set", change)]
    with held(tmp_path / "run" / LOCK, tmp_path / "run"):
        both = torchrun("quickstart", *overrides, "--out", str(tmp_path / "run"))
        assert [path.name for path in (tmp_path / "run").iterdir()] == [LOCK]
    assert both.returncode != 0
    assert both.stderr.count(f"run: process {os.getpid()} on {socket.gethostname()} writes there") == 2


def test_ctrl_c_saves_under_torchrun_and_a_second_one_too(tmp_path: Path) -> None:
    """torchrun hands the first on and dies of the second, after a SIGTERM to its processes: the first of them says,
    alone, which state is on disk, and it is."""
    out = tmp_path / "run"
    overrides = [part for change in [*CHANGES, "optimization.epochs=2000"] for part in ("--set", change)]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        [*launch, "dfmcl.training.train", "quickstart", *overrides, "--out", str(out)],
        cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    wait_until((out / STATE).exists, process)
    for _ in range(2):
        process.send_signal(signal.SIGINT)
        time.sleep(0.2)  # as fast as a hand is
    _, errors = process.communicate(timeout=120)
    assert process.returncode != 0
    assert errors.count("dfmcl: stopping at the next step") == 1
    steps = re.findall(rf"dfmcl: {out}: (?:stopped and saved at|ended at once; its state of) step (\d+) ", errors)
    assert len(steps) == 1, errors
    assert torch.load(out / STATE, weights_only=True)["step"] == int(steps[0])
    assert not list(out.rglob(".*"))


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
