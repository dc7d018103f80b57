"""Networks that many tests look at, and what stands for another processor: `python -m tests.portable` says more."""

from __future__ import annotations

import hashlib
import os
import shutil
import signal
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import cache, partial
from pathlib import Path

# Before torch loads: OpenMP threads that spin while they wait make a forward pass up to 100 times slower beside a busy
# process, and tests start servers. 3,000 spins cost 15 % on an idle machine, sleeping at once would cost 50 %.
os.environ.setdefault("GOMP_SPINCOUNT", "3000")
# `make test` runs three processes; what they start must not want two cores each, and equals a run in here bit for bit.
os.environ["OMP_NUM_THREADS"] = "1"

# Digests of test images are no part of anybody's home.
os.environ.setdefault("DFMCL_CACHE", str(Path(tempfile.gettempdir()) / f"dfmcl-tests-cache-{os.getuid()}"))

# A shell that runs us in the background lets us ignore SIGINT, and so would every server that a test interrupts.
signal.signal(signal.SIGINT, signal.default_int_handler)

import pytest
import torch
from hypothesis import settings

from tests.clouds import KINDS, Server, server
from tests.exports import Export, exported
from tests.networks import Networks, network
from tests.processes import made_once

# How long an example takes depends on what else runs, and is nothing that a test states by the way.
settings.register_profile("patient", deadline=None)
settings.load_profile("patient")

# They take minutes; begun last, they would leave the other processes with nothing to do. The longest first.
LONG = (
    "test_supervisor.py", "test_gate.py", "test_pipelines.py", "test_two_at_once.py", "test_readme.py",
    "test_strength.py", "test_train.py", "test_alarms.py", "test_disbelief.py", "test_deploy_watching.py",
    "test_campaign.py", "test_checks.py", "test_gateway_load.py", "test_openvino.py",
)  # fmt: skip
# More than four seconds each, for their servers, trainings and whole commands; `--quick` leaves them out, and LONG.
SLOW = (
    "test_attacks.py", "test_attestation.py", "test_bounds.py", "test_buckets.py", "test_candidate.py", "test_card.py",
    "test_cli.py", "test_crafted.py", "test_deploy_commands.py", "test_deploy_kubernetes.py", "test_detection.py",
    "test_distribution.py", "test_export.py", "test_fab.py", "test_formats.py", "test_gateway.py",
    "test_gateway_client.py", "test_gateway_endpoints.py", "test_gateway_pages.py", "test_gateway_process.py",
    "test_gateway_renewal.py", "test_gradients.py", "test_honest.py", "test_html.py", "test_learner.py",
    "test_model_repository.py", "test_models.py", "test_page.py", "test_parallel.py", "test_platform.py",
    "test_mirror.py", "test_stores.py",
    "test_promotion.py", "test_quickstart_shipped.py", "test_repair.py", "test_rollout_slices.py", "test_sidecar.py",
    "test_sidecar_gateway.py", "test_standard.py", "test_subject.py", "test_subspaces.py", "test_transfer.py",
    "test_triton.py", "test_watch_command.py", "test_watch_metrics.py", "test_releases.py", "test_watch_triton.py",
    "test_decide.py",
)  # fmt: skip


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Long files first; with `--quick` no slow ones."""
    items.sort(key=lambda item: LONG.index(item.path.name) if item.path.name in LONG else len(LONG))
    if config.getoption("--quick"):
        config.hook.pytest_deselected(items=[item for item in items if item.path.name in (*LONG, *SLOW)])
        items[:] = [item for item in items if item.path.name not in (*LONG, *SLOW)]


def pytest_addoption(parser: pytest.Parser) -> None:
    """What differs on another machine, or in another draw; a test holds whatever they are."""
    parser.addoption("--quick", action="store_true", help="only tests of files that take a few seconds")
    group = parser.getgroup("portable")
    group.addoption("--fixture-seed", type=int, default=0, help="train fixture networks from this seed; 0: the pinned")
    group.addoption("--fixture-jitter", type=int, default=0, help="which draw of 1e-6 noise on their weights; 0: none")
    # One: processes with two threads each wait for each other on two cores, and take more than twice as long.
    group.addoption("--torch-threads", type=int, default=1, help="threads of torch in each test process")


def pytest_configure(config: pytest.Config) -> None:
    torch.set_num_threads(config.getoption("--torch-threads"))


@pytest.fixture(scope="session")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where all processes of a session keep what is made once."""
    own = tmp_path_factory.getbasetemp()
    return own.parent if "PYTEST_XDIST_WORKER" in os.environ else own


@pytest.fixture(scope="session")
def networks(request: pytest.FixtureRequest, shelf: Path, tmp_path_factory: pytest.TempPathFactory) -> Networks:
    """A name of tests/networks.py to its run: a copy of the pinned one, or what the options ask for; made once."""
    seed, jitter = (request.config.getoption(f"--fixture-{what}") for what in ("seed", "jitter"))
    folder = tmp_path_factory.mktemp("networks")

    @cache
    def copied(name: str) -> Path:
        made = made_once(shelf / "drawn" / name, lambda out: network(name, out, seed=seed, jitter=jitter))
        return Path(shutil.copytree(made, folder / name))

    return copied


@pytest.fixture(scope="session")
def export_once(shelf: Path) -> Export:
    """`export_once(run, out)`: as `export`, but that a run of the same bytes is exported once a session."""
    return partial(exported, shelf=shelf / "candidates")


@pytest.fixture(scope="session")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Server]]:
    """`servers(scheme)`: the server of that kind of bucket, one for all tests, which begins when the first one asks."""
    with ExitStack() as running:
        yield cache(lambda scheme: running.enter_context(server(scheme, tmp_path_factory.mktemp(scheme))))


@pytest.fixture
def new_bucket(
    servers: Callable[[str], Server], monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> Callable[[str], str]:
    """`new_bucket(scheme)`: where a repository may come to lie; this process and what it starts have credentials."""

    def made(scheme: str) -> str:
        for name, value in servers(scheme).variables.items():
            monkeypatch.setenv(name, value)
        return servers(scheme).create(f"releases-{hashlib.sha256(request.node.nodeid.encode()).hexdigest()[:16]}")

    return made


@pytest.fixture(params=KINDS)
def cloud(request: pytest.FixtureRequest, servers: Callable[[str], Server]) -> Server:
    """The server of each kind of bucket in turn."""
    return servers(request.param)


@pytest.fixture
def bucket(cloud: Server, new_bucket: Callable[[str], str]) -> str:
    """The address of a repository to be, in a new bucket of each kind."""
    return new_bucket(cloud.scheme)


@pytest.fixture(scope="session")
def standard_run(networks: Networks) -> Path:
    """A plain narrow network on digits: about 80 % clean, nothing under attack."""
    return networks("standard")


@pytest.fixture(scope="session")
def other_run(networks: Networks) -> Path:
    """Another seed of the same."""
    return networks("other")
