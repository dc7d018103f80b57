"""What a user installs: a wheel with the command, the presets and the schema, and nothing else."""

from __future__ import annotations

import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(out), str(ROOT)]
    subprocess.run(command, check=True)
    (built,) = out.glob("dfmcl-*.whl")
    return built


def test_wheel_holds_the_rooms_and_their_data(wheel: Path) -> None:
    """Presets, schema and Triton requirements are in; tests and deploy are not."""
    names = set(zipfile.ZipFile(wheel).namelist())
    wanted = {path.relative_to(ROOT).as_posix() for path in (ROOT / "training" / "presets").glob("*.toml")}
    wanted |= {path.relative_to(ROOT).as_posix() for path in (ROOT / "training" / "campaigns").glob("*.toml")}
    wanted |= {"gating/report.schema.json", "serving/triton-requirements.txt", "serving/backend/model.py", "dfmcl.py"}
    assert wanted <= names
    tops = {name.partition("/")[0] for name in names if "dist-info" not in name}
    assert tops == {"dfmcl.py", "robustness", "training", "gating", "serving", "monitoring"}


def test_clean_environment_gives_a_working_command(wheel: Path, tmp_path: Path) -> None:
    """pip install into a fresh environment: help, presets, and a clear word where an extra is missing."""
    venv.create(tmp_path / "env", with_pip=True)
    binaries = tmp_path / "env" / "bin"
    subprocess.run([binaries / "pip", "install", "--quiet", wheel], check=True, cwd=tmp_path)
    assert subprocess.run([binaries / "dfmcl", "--help"], cwd=tmp_path, check=False).returncode == 0
    presets = subprocess.run([binaries / "dfmcl", "presets"], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert {"paper", "quickstart"} <= {line.split()[0] for line in presets.stdout.splitlines()}
    (tmp_path / "x.toml").write_text((ROOT / "deploy" / "quickstart" / "gate.toml").read_text())
    calls = {
        "train quickstart --out run": "train",
        "campaign table1_small --out out": "train",
        "evaluate run": "train",
        "pack run --out out": "train",
        "export run --out out": "train",
        "gate c --run run --policy x.toml --out out": "train",
        "keygen key": "train",
        "verify c --evidence e --trust x.toml": "serve",
        "promote c --evidence e --repository r --name m --trust x.toml": "serve",
        "serve --repository r": "serve",
        "watch --config x.toml": "monitor",
    }
    for call, extra in calls.items():
        command = [binaries / "dfmcl", *call.split()]
        result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert result.returncode == 2, (call, result.stderr)
        assert f"pip install 'dfmcl[{extra}]'" in result.stderr, call
    assert sorted(path.name for path in tmp_path.iterdir()) == ["env", "x.toml"]
