"""`quickstart.py --model shipped` on a stand-in for the shipped model, with the real Triton."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import quickstart as program
from dfmcl.common.errors import Broken
from dfmcl.serving.triton import environment
from tests.shipping import NAME, ship

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def repository(standard_run: Path, other_run: Path) -> Path:
    return ship(standard_run, other_run)


def quickstart(repository: Path, folder: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "quickstart.py"), "--model", "shipped", "--exit"]
    return subprocess.run(
        [*command, "--repository", str(repository), "--trust", str(trust_in(repository))],
        cwd=folder,
        env=os.environ | {"COLUMNS": "160"},
        capture_output=True,
        text=True,
        check=False,
    )


def trust_in(repository: Path) -> Path:
    """Trusts the key that signed what the stand-in ships."""
    return repository.parent / "release.toml"


def listing(directory: Path) -> dict[str, tuple[str, int]]:
    """Digest and time of every file."""
    files = sorted(path for path in directory.rglob("*") if path.is_file())
    return {str(path): (hashlib.sha256(path.read_bytes()).hexdigest(), path.stat().st_mtime_ns) for path in files}


def test_shipped_model_is_verified_served_and_attacked(repository: Path, tmp_path: Path) -> None:
    """Every stage holds, nothing is written into the repository, and the gate's figures come back through Triton."""
    try:
        environment.find_environment(None)
    except Broken as error:
        pytest.skip(str(error))
    before = listing(repository)
    done = quickstart(repository, tmp_path)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert listing(repository) == before
    for row in ("clean", "robust"):
        (gate, served) = re.findall(rf"│ {row} +│ ([^│]+?) +│ ([^│]+?) +│", done.stdout)[0]
        assert gate == served
    assert re.search(r"│ <= mi-fgsm-10 +│ +│ +│ [\d.]+ \[[\d.]+, [\d.]+\]", done.stdout)
    assert re.search(r"gRPC 127\.0\.0\.1:\d+\nmetrics: http://127\.0\.0\.1:\d+/metrics\n", done.stdout)
    assert "dfmcl train" not in done.stdout
    assert "all stages held" in done.stdout


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda model: (model / "1" / "model.onnx").open("ab").write(b"\0"), "is not what the gate judged"),
        (lambda model: (model / "1" / "probes.npz").open("ab").write(b"\0"), "is not what the gate wrote"),
        (lambda model: (model / "1" / "report.json").open("ab").write(b"\n"), "is not the report that was signed"),
        (lambda model: (model / "README.md").write_text("about another"), "is not about the version that is served"),
        (lambda model: shutil.rmtree(model / "surrogates"), "no surrogates to attack it with"),
        (lambda model: shutil.rmtree(model), "holds 0 promoted models"),
    ],
    ids=["model", "probes", "report", "card", "surrogates", "nothing"],
)
def test_a_release_that_does_not_hold_ends_with_1(
    repository: Path, tmp_path: Path, spoil: Callable[[Path], object], reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Verify stops the line before anything is served."""
    copy = shutil.copytree(repository, tmp_path / "models")
    spoil(copy / NAME)
    monkeypatch.chdir(tmp_path)
    printed: list[str] = []
    monkeypatch.setattr(program.console, "print", lambda *values, **_: printed.append(str(values[0])))
    trust = ["--trust", str(trust_in(repository))]
    assert program.main(["--model", "shipped", "--exit", "--repository", str(copy), *trust]) == 1
    assert reason in printed[-1]
    assert not any(line.startswith("\n$ dfmcl serve") for line in printed)
