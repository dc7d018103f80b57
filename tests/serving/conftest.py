"""A tiny run, its candidate, evidence for it, and a real Triton that serves it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from serving import environment, promotion
from serving.errors import Broken
from serving.export import export
from tests.serving.workshop import Served, write_evidence, write_run


@pytest.fixture(scope="session")
def run_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("serving") / "run")


@pytest.fixture(scope="session")
def candidate(run_directory: Path) -> Path:
    """A really exported candidate; tests that change it copy it first."""
    out = run_directory.parent / "candidate"
    export(run_directory, out)
    return out


@pytest.fixture(scope="session")
def evidence(candidate: Path) -> Path:
    return write_evidence(candidate.parent / "evidence", candidate)


@pytest.fixture(scope="session")
def needs_triton() -> None:
    """Skips a test on machines without the Triton environment."""
    try:
        environment.find_environment(None)
    except Broken as error:
        pytest.skip(str(error))


@pytest.fixture
def repository(tmp_path: Path, candidate: Path, evidence: Path) -> Path:
    """A repository with one promoted version."""
    promotion.promote(candidate, evidence, tmp_path / "models", name="digits")
    return tmp_path / "models"


@pytest.fixture(scope="session")
def served(needs_triton: None, candidate: Path, evidence: Path) -> Iterator[Served]:
    """One Triton for all tests that only ask it questions."""
    models = candidate.parent / "models"
    promotion.promote(candidate, evidence, models, name="digits")
    server = Served(models, candidate.parent / "ready.json").start()
    yield server
    assert server.close() == 0
