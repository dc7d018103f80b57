"""What a user installs: a wheel with the command, the presets and the schema, and nothing else."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("dist")
    # By way of the source distribution, as a release is built: what that lacks, the wheel lacks.
    subprocess.run([sys.executable, "-m", "build", "--outdir", str(out), str(ROOT)], check=True, capture_output=True)
    (built,) = out.glob("dfmcl-*.whl")
    return built


def test_wheel_holds_the_rooms_and_their_data(wheel: Path) -> None:
    """Presets, schema, templates and Triton requirements are in."""
    names = set(zipfile.ZipFile(wheel).namelist())
    wanted = {path.relative_to(ROOT).as_posix() for path in (ROOT / "training").glob("*/*.toml")}
    wanted |= {
        "gating/report.schema.json",
        "gating/robustness.schema.json",
        "gating/formats/report.html.jinja",
        "serving/gateway/head.html",
        "serving/gateway/index.html",
    }
    wanted |= {"serving/triton/requirements.txt", "serving/triton/backend/model.py", "cli/__init__.py", "__main__.py"}
    assert {f"dfmcl/{name}" for name in wanted} <= names
    assert not {name for name in names if name.endswith("/") or "__pycache__" in name}


def test_nothing_but_dfmcl_appears_in_site_packages(wheel: Path, tmp_path: Path) -> None:
    """No other name of ours can hide a user's folder, or another's package."""
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(tmp_path), str(wheel)]
    subprocess.run(command, check=True)
    tops = {path.name for path in tmp_path.iterdir()} - {"bin"}
    assert {re.sub(r"^dfmcl-.*\.dist-info$", "dist-info", name) for name in tops} == {"dfmcl", "dist-info"}


def test_clean_environment_gives_a_working_command(wheel: Path, tmp_path: Path) -> None:
    """pip install into a fresh environment: help, presets, and a clear word where an extra is missing."""
    venv.create(tmp_path / "env")
    binaries = tmp_path / "env" / "bin"
    pip = [sys.executable, "-m", "pip", "--python", str(binaries / "python")]
    subprocess.run([*pip, "install", "--quiet", wheel], check=True, cwd=tmp_path)
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
        "gateway --config x.toml": "gateway",
        "apikey shop": "gateway",
        "watch --config x.toml": "monitor",
        "craft --config x.toml": "monitor",
    }
    for call, extra in calls.items():
        command = [str(binaries / "dfmcl"), *call.split()]
        result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert result.returncode == 2, (call, result.stderr)
        assert f"pip install 'dfmcl[{extra}]'" in result.stderr, call
    assert sorted(path.name for path in tmp_path.iterdir()) == ["env", "x.toml"]


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Skips where no package index can be reached."""
    out = tmp_path_factory.mktemp("index")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--dest", str(out), "typer"]
    made = subprocess.run(command, capture_output=True, text=True, check=False)
    if made.returncode:
        pytest.skip("no package index can be reached")


@pytest.mark.parametrize("extra", ["train", "monitor"])
def test_what_needs_torch_asks_for_it(wheel: Path, extra: str) -> None:
    """Each of the large extras brings torch by itself. That they can be resolved is what `make setup` shows."""
    with zipfile.ZipFile(wheel) as files:
        (name,) = (name for name in files.namelist() if name.endswith(".dist-info/METADATA"))
        text = files.read(name).decode()
    asked = [Requirement(line) for line in re.findall(r"^Requires-Dist: (.*)$", text, flags=re.MULTILINE)]
    names = {one.name for one in asked if not one.marker or one.marker.evaluate({"extra": extra})}
    assert "torch" in names


def installed(wheel: Path, extra: str, where: Path) -> Path:
    """The commands of a fresh environment with one extra; it must not hold what only training needs."""
    venv.create(where)
    pip = [sys.executable, "-m", "pip", "--python", str(where / "bin" / "python")]
    subprocess.run([*pip, "install", "--quiet", "--no-compile", f"{wheel}[{extra}]"], check=True, cwd=where)
    listed = subprocess.run([*pip, "list", "--format", "json"], capture_output=True, text=True, check=True)
    names = {entry["name"].lower() for entry in json.loads(listed.stdout)}
    assert "dfmcl" in names
    assert names & {"torch", "torchvision", "onnx", "onnxruntime", "scikit-learn"} == set()
    assert ("scipy" in names) == (extra in ("gateway", "serve"))  # who verifies derives the bounds of a verdict again
    return where / "bin"


def test_serving_needs_its_extra_alone(wheel: Path, index: None, tmp_path: Path) -> None:
    """The image's `serve` target, in effect: the shipped model is verified, anything else is not, without torch."""
    binaries = installed(wheel, "serve", tmp_path / "env")
    model, trust = ROOT / "model_repository" / "resnet18-cifar10", ROOT / "deploy" / "resnet18-cifar10"
    command: list[str | Path] = [binaries / "dfmcl", "verify", model, "--trust", trust / "trust.toml"]
    made = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert made.returncode == 0, made.stderr
    command[2] = model / "surrogates"
    assert subprocess.run(command, cwd=tmp_path, capture_output=True, check=False).returncode in (1, 2)
    words = ["capacity", "--requests-per-second", "1", "--images-per-second-per-replica", "100"]
    assert subprocess.run([binaries / "dfmcl", *words], cwd=tmp_path, capture_output=True, check=False).returncode == 0


def test_the_gateway_needs_its_extra_alone(wheel: Path, index: None, tmp_path: Path) -> None:
    """The image's `gateway` target, in effect: it loads its program and its configuration."""
    binaries = installed(wheel, "gateway", tmp_path / "env")
    config = ROOT / "deploy" / "resnet18-cifar10" / "gateway.toml"
    code = f"import dfmcl.serving.gateway.service, dfmcl.serving.gateway.config as c; c.load_config({str(config)!r})"
    for name, *words in (("python", "-c", code), ("dfmcl", "apikey", "someone")):
        made = subprocess.run([binaries / name, *words], cwd=tmp_path, capture_output=True, text=True, check=False)
        assert made.returncode == 0, made.stderr
