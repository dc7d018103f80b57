"""Two commands that write to one place: one is refused at once, and a killed one leaves nothing behind."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from dfmcl.gating.signing.keys import keygen
from dfmcl.robustness.data import load_dataset
from tests.exports import Export
from tests.processes import wait_until
from tests.training.workshop import TINY

COMMAND = str(Path(sys.executable).with_name("dfmcl"))
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}
POLICY = """
criteria = ["robust_accuracy >= 0.3 at 95 %"]
[threat]
eps = "1/255"
[data]
name = "digits"
images = 100
[attacks]
suite = ["fgsm", "pgd-40"]
substitute = 0
block = 10
[checks]
images = 32
"""
WATCH = """
[target]
url = "127.0.0.1:1"
model = "digits"
[data]
name = "digits"
[threat]
eps = "8/255"
[probe]
crafted = "out"
attacks = ["mi-fgsm-10"]
images = 8
[surrogates]
runs = ["RUN"]
"""
TRAIN = [
    "train", "quickstart", "--out", "out", "--resume", "--set", "model.width=16", "--set", "optimization.epochs=200",
    "--set", "data.train_images=120", "--set", "heldout.images=10", "--set", "heldout.attack_steps=1",
    "--set", "curriculum.steps=1",
]  # fmt: skip
CAMPAIGN = ["campaign", "tiny.toml", "--data-path", "digits.npz", "--device", "cpu", "--out", "out"]
HOLDER = """
import sys
from pathlib import Path
from dfmcl.common.files import whole_directory
from dfmcl.common.locks import held
with {}:
    print("held", flush=True)
    sys.stdin.read()
"""


@dataclass(frozen=True)
class Case:
    """A command; what shows that it is at work (a pattern of files, one of which has been written to: a lock is held
    once it names its holder); how it ends once it may, told to be quick; what else must be refused meanwhile."""

    arguments: list[str]
    at_work: str
    quick: tuple[str, ...] = ()
    code: int = 0
    others: tuple[str, ...] = ()


CASES = {
    "train": Case(TRAIN, "out/state/.state.pt.*.part", ("--max-minutes", "0"), 130),
    "campaign": Case(CAMPAIGN, "out/runs/*/metrics.csv", others=("--table-only",)),
    "export": Case(["export", "RUN", "--out", "out"], ".out.*.part"),
    "gate": Case(["gate", "candidate", "--policy", "gate.toml", "--out", "out"], "out.partial/block-00001.npz"),
    "craft": Case(["craft", "--config", "watch.toml", "--device", "cpu"], ".out.*.part"),
    "evaluate": Case(["evaluate", "RUN", "--attack", "pgd-20", "--images", "60", "--out", "out"], ".out.lock"),
}


@pytest.fixture
def place(tmp_path: Path, standard_run: Path, export_once: Export, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A directory with a run, its candidate, a policy, a campaign and a watch; processes that were started end."""
    digits = load_dataset("digits")
    names = ("x_train", "y_train", "x_test", "y_test")
    np.savez(tmp_path / "digits.npz", **{name: getattr(digits, name)[:300] for name in names})
    (tmp_path / "tiny.toml").write_text(TINY)
    (tmp_path / "gate.toml").write_text(POLICY)
    (tmp_path / "watch.toml").write_text(WATCH.replace("RUN", str(standard_run)))
    shutil.copytree(standard_run, tmp_path / "RUN")
    export_once(standard_run, tmp_path / "candidate")
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    for process in STARTED:
        process.kill()
        process.communicate()
    STARTED.clear()


STARTED: list[subprocess.Popen[str]] = []


def start(*command: str) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT
    )
    STARTED.append(process)
    return process


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([COMMAND, *arguments], capture_output=True, text=True, check=False, env=ENVIRONMENT)


def stop_while(process: subprocess.Popen[str], condition: Callable[[], object]) -> None:
    """Stop a process where the condition holds, be it for a moment only."""
    while True:
        deadline = time.monotonic() + 240
        while not condition():
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.0005)  # what is waited for lasts as long as a file takes to be written
        process.send_signal(signal.SIGSTOP)
        wait_until(lambda: Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[0] == "T")
        if condition():
            return
        process.send_signal(signal.SIGCONT)


def written(path: Path) -> bool:
    try:
        return path.is_dir() or path.stat().st_size > 0
    except FileNotFoundError:
        return False


def leftovers(place: Path) -> list[str]:
    """Hidden files: whatever is staged or locked."""
    return sorted(str(path.relative_to(place)) for path in place.rglob("*") if path.name.startswith("."))


def refusal(place: str, pid: int) -> str:
    holder = f"process {pid} on {socket.gethostname()}"
    return f"dfmcl: {place}: {holder} writes there; wait for its end, or name another place"


@pytest.mark.parametrize("name", CASES)
def test_the_second_is_refused_and_a_killed_one_leaves_nothing(place: Path, name: str) -> None:
    """By real processes: stopped in the middle, the first keeps the second out, whose line names it. After kill -9 of
    the first, the same command works again, and nothing that was half written is left."""
    case = CASES[name]
    first = start(COMMAND, *case.arguments)
    stop_while(first, lambda: any(map(written, place.glob(case.at_work))))
    said = "out.partial" if name == "gate" else "out"
    for options in ((), *((other,) for other in case.others)):
        second = run(*case.arguments, *options)
        assert (second.returncode, second.stderr.splitlines()) == (2, [refusal(said, first.pid)])
    first.kill()
    first.communicate()
    assert leftovers(place), "nothing was there to clear up"
    again = run(*case.arguments, *case.quick)
    assert again.returncode == case.code, again.stderr
    assert leftovers(place) == []
    assert not (place / "out.partial").exists()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupted_gate_says_what_it_keeps(place: Path, number: signal.Signals, code: int) -> None:
    """However often it is told, one line, and the blocks that were done; the same command goes on from them."""
    process = start(COMMAND, *CASES["gate"].arguments)
    wait_until((place / "out.partial" / "block-00001.npz").exists, process)
    for _ in range(3):
        process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == code
    blocks = sorted((place / "out.partial").glob("*.npz"))
    said = f"interrupted; {len(blocks)} blocks of images are done and kept; repeat the command to go on"
    assert errors.splitlines()[-1] == f"dfmcl: out.partial: {said}"
    assert leftovers(place) == []


@pytest.mark.parametrize("name", ["pack", "sign"])
def test_what_takes_a_moment_is_refused_meanwhile(place: Path, standard_run: Path, name: str) -> None:
    """Another process has the place that `pack` would write to, or the evidence that `sign` would add to."""
    packed = f"out/{standard_run.name}"
    blocks = {
        "pack": f"whole_directory(Path('{packed}'), ())",
        "sign": "held(Path('.evidence.lock'), Path('evidence'))",
    }
    calls = {"pack": ["pack", str(standard_run), "--out", "out"], "sign": ["sign", "evidence", "--key", "k.key"]}
    keygen(place / "k")
    (place / "evidence").mkdir()
    holder = start(sys.executable, "-c", HOLDER.format(blocks[name]))
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    second = run(*calls[name])
    said = {"pack": packed, "sign": "evidence"}[name]
    assert (second.returncode, second.stderr.splitlines()) == (2, [refusal(said, holder.pid)])


def test_a_finished_run_is_read_while_another_command_writes_beside_it(place: Path) -> None:
    """Who only reads a run asks for no lock."""
    holder = start(sys.executable, "-c", HOLDER.format("held(Path('RUN/.lock'), Path('RUN'))"))
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    done = run("evaluate", "RUN", "--attack", "fgsm", "--images", "5")
    assert done.returncode == 0, done.stderr
