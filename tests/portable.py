"""The numeric tests once more, as another processor or another draw would run them: `python -m tests.portable`.

All perturbations run, one by one, or the named ones; with `--drawn REVISION` the one that a commit draws.
A test that is green here holds on processors that nobody here has.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parents[1]
# What CI has the time for: attacks beside their peers, golden losses, two processes. Then all that decides by numbers.
CORE = (
    *(f"tests/robustness/test_{name}.py" for name in ("apgd", "attacks", "strength", "subspaces", "transfer")),
    *(f"tests/training/test_{name}.py" for name in ("golden", "masking", "parallel")),
)
NUMERIC = (
    "tests/robustness",
    *(f"tests/training/test_{name}.py" for name in ("golden", "learner", "masking", "measurement", "parallel")),
    *("tests/gating/test_gate.py", "tests/gating/test_disbelief.py"),
    *("tests/release/test_export.py", "tests/release/test_parity.py"),
)
# Their bounds are of memory, which no rounding changes, and they take minutes.
NOT_NUMERIC = (
    "tests/robustness/test_portions.py::test_memory_does_not_grow_with_the_images",
    "tests/training/test_learner.py::test_full_width_trains_in_four_gibibytes",
)
PROCESSES = 3  # as `make test`; fewer where each has several threads


@dataclass(frozen=True)
class Perturbation:
    """environment: of the processes, for libraries' choice of instructions. options: of pytest. threads: of torch."""

    environment: dict[str, str] = field(default_factory=dict)
    seed: int = 0
    jitter: int = 0
    threads: int = 1

    @property
    def options(self) -> list[str]:
        """What pytest is told."""
        return [f"--fixture-seed={self.seed}", f"--fixture-jitter={self.jitter}", f"--torch-threads={self.threads}"]

    def __str__(self) -> str:
        return " ".join([*(f"{key}={value}" for key, value in self.environment.items()), *self.options])


def instructions(onednn: str = "", aten: str = "") -> dict[str, str]:
    """Convolutions by oneDNN, and all else by ATen, as a processor with no more than this would compute them."""
    named = {"ONEDNN_MAX_CPU_ISA": onednn, "ATEN_CPU_CAPABILITY": aten}
    return {key: value for key, value in named.items() if value}


# Five draws of the networks, five of their weights' last digits; each beside another choice of instructions or threads.
PERTURBATIONS = {
    "seed-1": Perturbation(instructions("AVX2"), seed=1),
    "seed-2": Perturbation(instructions("AVX512_CORE", "default"), seed=2),
    "seed-3": Perturbation(threads=2, seed=3),
    "seed-4": Perturbation(instructions("AVX2", "avx2"), seed=4),
    "seed-5": Perturbation(instructions(aten="default"), threads=3, seed=5),
    "jitter-1": Perturbation(jitter=1),
    "jitter-2": Perturbation(instructions("AVX512_CORE"), jitter=2),
    "jitter-3": Perturbation(instructions("AVX2", "default"), jitter=3),
    "jitter-4": Perturbation(instructions(aten="avx2"), threads=2, jitter=4),
    "jitter-5": Perturbation(instructions("AVX2", "avx2"), threads=3, jitter=5),
}


def drawn(revision: str) -> str:
    """The perturbation that a commit draws, the same each time, of those with vector instructions: without, a run takes
    three times as long."""
    quick = [name for name, one in PERTURBATIONS.items() if one.environment.get("ATEN_CPU_CAPABILITY") != "default"]
    return quick[int(hashlib.sha256(revision.encode()).hexdigest(), 16) % len(quick)]


Margins = dict[tuple[str, str], float]
"""By test and side, `p above` or `p below` its level: the p nearest to that level."""


def margins_in(report: Path) -> Margins:
    """What tests recorded of themselves, from pytest's JUnit file."""
    found: Margins = {}
    for case in xml.etree.ElementTree.parse(report).iter("testcase"):
        for entry in case.iter("property"):
            found = nearest(found, {(str(case.get("name")), str(entry.get("name"))): float(str(entry.get("value")))})
    return found


def nearest(one: Margins, other: Margins) -> Margins:
    """Of each test and side the value nearest to its level: the least above, the largest below."""
    chosen = dict(one)
    for (test, side), value in other.items():
        choose = min if side.endswith("above") else max
        chosen[test, side] = choose(value, chosen.get((test, side), value))
    return chosen


def run(name: str, paths: Sequence[str]) -> tuple[int, Margins]:
    """pytest's exit code under a perturbation, and the margins of its tests."""
    chosen = PERTURBATIONS[name]
    processes = max(1, PROCESSES - chosen.threads + 1)
    print(f"portable: {name}: {chosen}", flush=True)
    command = [sys.executable, "-m", "pytest", "--quiet", f"--numprocesses={processes}", "--dist=loadfile"]
    command += ["--no-loadscope-reorder", "--durations=20", *chosen.options]
    command += [*(f"--deselect={test}" for test in NOT_NUMERIC), *paths]
    # More threads than cores would wait for each other at full speed otherwise.
    begun, environment = time.monotonic(), {"OMP_WAIT_POLICY": "PASSIVE", **os.environ, **chosen.environment}
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "junit.xml"
        code = subprocess.run([*command, f"--junitxml={report}"], cwd=ROOT, env=environment, check=False).returncode
        margins = margins_in(report) if report.exists() else {}
    print(f"portable: {name}: {'green' if code == 0 else 'RED'} after {time.monotonic() - begun:.0f} s", flush=True)
    return code, margins


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(PERTURBATIONS)}; all by default")
    parser.add_argument("--drawn", metavar="REVISION", help="run the core under the one that this commit draws")
    parser.add_argument("--tests", nargs="+", default=[], metavar="PATH", help="these tests instead")
    told = parser.parse_args()
    names = [drawn(told.drawn)] if told.drawn else told.names or list(PERTURBATIONS)
    tests = told.tests or (CORE if told.drawn else NUMERIC)
    if unknown := [name for name in names if name not in PERTURBATIONS]:
        parser.error(f"{unknown[0]}: no perturbation; choose from {', '.join(PERTURBATIONS)}")
    red: list[str] = []
    weakest: Margins = {}
    for name in names:
        code, margins = run(name, tests)
        red += [name] if code else []
        weakest = nearest(weakest, margins)
    for (test, side), value in sorted(weakest.items()):
        print(f"portable: weakest {side} its level: {value:.2g}  {test}")
    print(f"portable: {len(names) - len(red)} of {len(names)} green" + (f"; red: {', '.join(red)}" if red else ""))
    return bool(red)


if __name__ == "__main__":
    sys.exit(main())
