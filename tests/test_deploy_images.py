"""The Dockerfile, without an engine: linted, pinned, not root, and its context holds what the wheel needs only."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
import yaml

from tests.deploying import DEPLOY, ROOT, tool

DOCKERFILE = DEPLOY / "images" / "Dockerfile"
TEXT = DOCKERFILE.read_text(encoding="utf-8")
# Name, base and lines of each stage.
STAGES = {
    name: (base, body)
    for base, name, body in re.findall(
        r"^FROM (\S+) AS (\w+)\n(.*?)(?=^FROM |\Z)", TEXT, flags=re.DOTALL | re.MULTILINE
    )
}


def test_the_linter_has_nothing_to_say(tmp_path: Path) -> None:
    """hadolint, which does notice a base without a version."""
    linter = tool("hadolint")
    made = subprocess.run([linter, str(DOCKERFILE)], capture_output=True, text=True, check=False)
    assert made.returncode == 0, made.stdout
    wrong = tmp_path / "Dockerfile"
    wrong.write_text(TEXT.replace("FROM ${PYTHON} AS wheel", "FROM python:latest AS wheel"))
    assert subprocess.run([linter, str(wrong)], capture_output=True, check=False).returncode == 1


def test_bases_are_pinned() -> None:
    """Every base is a stage, nothing, or an argument whose default names a version down to the patch."""
    defaults = dict(re.findall(r"^ARG (\w+)=(\S+)$", TEXT.partition("FROM")[0], flags=re.MULTILINE))
    assert set(defaults) == {"PYTHON", "CUDA"}
    for image in defaults.values():
        assert re.search(r":\d+\.\d+\.\d+", image), image
    for base, _ in STAGES.values():
        assert base in {"scratch", *STAGES} or base.strip("${}") in defaults


@pytest.mark.parametrize("target", ["serve", "gateway", "watch", "train"])
def test_targets_do_not_run_as_root(target: str) -> None:
    """The last USER, in the target or what it builds on, is 1000: that of NVIDIA's image and of the manifests."""
    users: list[str] = []
    name = target
    while name in STAGES:
        base, body = STAGES[name]
        users = re.findall(r"^USER (\S+)$", body, flags=re.MULTILINE) + users
        name = base
    assert users[-1:] == ["1000:1000"]


def test_targets_install_their_extra_and_have_a_health_check() -> None:
    """Each installs the wheel with extras that exist; servers say whether they live."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    found = {name: re.search(r"\.whl\)\[([\w,]+)\]", body) for name, (_, body) in STAGES.items()}
    installed = {name: names[1].split(",") for name, names in found.items() if names}
    assert set(installed) == {"serve", "gateway", "watch", "train"}
    assert {name for names in installed.values() for name in names} <= set(extras)
    assert all("--no-cache-dir" in body for _, body in STAGES.values() if "pip " in body)
    for name, path in (("gateway", ":8080/healthz"), ("watch", ":9464/-/healthy")):
        assert "HEALTHCHECK" in STAGES[name][1]
        assert path in STAGES[name][1]


def test_every_target_is_used() -> None:
    """A target that nothing names would rot."""
    named = "".join(path.read_text(encoding="utf-8") for path in DEPLOY.rglob("*.yaml"))
    for target in set(STAGES) - {"wheel", "slim"}:
        assert f"dfmcl-{target}" in named, target


@pytest.fixture(scope="module")
def context(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What .dockerignore lets through, copied."""
    out = tmp_path_factory.mktemp("context")
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    assert "*" in lines  # nothing, but for what is named after it
    for line in lines:
        if line.startswith("!"):
            source = ROOT / line[1:].rstrip("/")
            if source.is_dir():
                shutil.copytree(source, out / source.name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(source, out)
    return out


def test_the_context_builds_the_wheel(context: Path, tmp_path: Path) -> None:
    """The build stage's command on the context gives what the checkout gives."""
    command = re.search(r"^RUN pip (wheel .*) \.$", STAGES["wheel"][1], flags=re.MULTILINE)
    assert command is not None
    words = command[1].replace("/wheels", str(tmp_path)).split()
    subprocess.run([sys.executable, "-m", "pip", *words, "--quiet", str(context)], check=True)
    (wheel,) = tmp_path.glob("dfmcl-*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    wanted = {
        f"dfmcl/{path.relative_to(ROOT).as_posix()}"
        for room in ("common", "robustness", "training", "gating", "release", "serving", "monitoring")
        for path in (ROOT / room).rglob("*")
        if path.suffix in (".py", ".toml", ".json", ".jinja", ".txt", ".html")
    }
    assert wanted <= names


def test_the_context_holds_no_secret_and_no_tests(context: Path) -> None:
    """Neither keys nor data sets nor the repository's history can get into a layer."""
    names = [path for path in context.rglob("*") if path.is_file()]
    assert not [path for path in names if path.suffix in (".key", ".pem") or "cifar10.npz" in path.name]
    assert {path.name for path in context.iterdir()} & {"tests", "deploy", ".git", ".venv", "runs"} == set()


def test_stack_and_dockerfile_agree() -> None:
    """Targets that compose builds are stages, under the name that Kubernetes pulls."""
    services = yaml.safe_load((DEPLOY / "compose.yaml").read_text())["services"]
    built = {service["image"]: service["build"]["target"] for service in services.values() if "build" in service}
    assert built == {f"dfmcl-{target}:0.1.0": target for target in ("serve", "gateway", "watch")}
    assert set(built.values()) <= set(STAGES)
