"""A tiny run, its candidate, evidence for it, and a real Triton that serves it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from dfmcl.common.errors import Broken
from dfmcl.gating.signing.attestation import Trust
from dfmcl.release import promotion
from dfmcl.release.stores.directory import Directory
from dfmcl.serving.triton import environment
from tests.exports import Export
from tests.serving.workshop import Served, write_evidence, write_run
from tests.signing import make_key, trusting, write_trust

THREADS = 1  # of a model: more spin while they wait, on the two cores that three test processes share


@pytest.fixture(scope="session")
def run_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("serving") / "run")


@pytest.fixture(scope="session")
def candidate(run_directory: Path, export_once: Export) -> Path:
    """A really exported candidate; tests that change it copy it first."""
    return export_once(run_directory, run_directory.parent / "candidate")


@pytest.fixture(scope="session")
def key(run_directory: Path) -> Path:
    """Signs the evidence of this room's tests."""
    return make_key(run_directory.parent / "keys")


@pytest.fixture(scope="session")
def trust(key: Path) -> Trust:
    """Trust in that key alone."""
    return trusting(key)


@pytest.fixture(scope="session")
def trust_file(key: Path) -> Path:
    """The same as a file."""
    return write_trust(key)


@pytest.fixture(scope="session")
def evidence(candidate: Path, key: Path) -> Path:
    return write_evidence(candidate.parent / "evidence", candidate, key)


@pytest.fixture(scope="session")
def needs_triton() -> None:
    """Skips a test on machines without the Triton environment."""
    try:
        environment.find_environment(None)
    except Broken as error:
        pytest.skip(str(error))


@pytest.fixture
def repository(tmp_path: Path, candidate: Path, evidence: Path, trust: Trust) -> Path:
    """A repository with one promoted version."""
    promotion.promote(candidate, evidence, Directory(tmp_path / "models"), name="digits", trust=trust, threads=THREADS)
    return tmp_path / "models"


@pytest.fixture(scope="session")
def served(needs_triton: None, candidate: Path, evidence: Path, trust: Trust) -> Iterator[Served]:
    """One Triton for all tests that only ask it questions; one that dies of a signal is replaced, as for users."""
    models = candidate.parent / "models"
    promotion.promote(candidate, evidence, Directory(models), name="digits", trust=trust, threads=THREADS)
    server = Served(models, candidate.parent / "ready.json", restarts=2).start()
    yield server
    assert server.close() == 0
