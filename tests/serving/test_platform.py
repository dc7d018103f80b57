"""docs/platform.md: its commands, run as they stand there, on real evidence and a real Triton."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from dfmcl.gating.signing.trust import load_trust
from dfmcl.release.stores.directory import Directory
from dfmcl.release.verification import verify_release
from dfmcl.serving.clients.triton import Client
from tests.clouds import Server
from tests.exports import Export
from tests.oci import registry_server
from tests.processes import tritons_own_ports, wait_until
from tests.serving.workshop import ROOT, write_evidence, write_run

PAGE = (ROOT / "docs" / "platform.md").read_text(encoding="utf-8")


def commands(page: str) -> list[str]:
    return [line for block in re.findall(r"```sh\n(.*?)```", page, flags=re.DOTALL) for line in block.splitlines()]


ON_ONE_MACHINE, _, REST = PAGE.partition("## In a bucket")
IN_A_BUCKET, _, IN_A_REGISTRY = REST.partition("## In an OCI registry")
LINES = commands(ON_ONE_MACHINE)


@pytest.fixture
def table(tmp_path: Path, candidate: Path, evidence: Path, key: Path) -> Path:
    """A directory with a first release, as the page takes it for granted."""
    shutil.copytree(candidate, tmp_path / "candidate")
    shutil.copytree(evidence, tmp_path / "evidence")
    (tmp_path / "trust.toml").write_text(f'keys = ["{key.with_suffix(".pub")}"]\n')
    return tmp_path


@pytest.fixture
def desk(table: Path, key: Path, export_once: Export, needs_triton: None) -> Iterator[Path]:
    """And with the next one."""
    export_once(write_run(table / "run", seed=1), table / "next" / "candidate")
    write_evidence(table / "next" / "evidence", table / "next" / "candidate", key)
    with tritons_own_ports():
        yield table


def run_as_written(lines: list[str], desk: Path) -> dict[str, str]:
    """What each command said; the one that serves runs beside the others, and ends with 0."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "DFMCL_TRITON_PYTHON": str(ROOT / ".venv-triton" / "bin" / "python")}
    said: dict[str, str] = {}
    [serving] = [line for line in lines if line.startswith("dfmcl serve") and "--print-docker" not in line]
    before = lines.index(serving)
    assert len(lines) >= 9
    server: subprocess.Popen[bytes] | None = None
    try:
        for number, line in enumerate(lines):
            if number == before:
                server = subprocess.Popen([*line.split(), "--ready-file", "ready.json"], cwd=desk, env=environment)
                wait_until((desk / "ready.json").exists, server)
                continue
            done = subprocess.run(
                line, shell=True, cwd=desk, env=environment, capture_output=True, text=True, check=False
            )
            assert done.returncode == 0, f"{line}\n{done.stdout}\n{done.stderr}"
            said[line] = done.stdout
        with Client("127.0.0.1:8001", "digits") as client:
            assert client.describe().version == "1", "it was rolled back"
    finally:
        if server is not None:
            server.send_signal(signal.SIGTERM)
            assert server.wait(timeout=40) == 0
    return said


def test_the_commands_run_as_written(desk: Path) -> None:
    """Promote, serve, promote the next, roll back, and all the rest; the served version is the one they name."""
    require_rolled_back(run_as_written(LINES, desk))


def test_the_commands_run_as_written_from_an_empty_bucket_to_a_rollback(
    desk: Path, servers: Callable[[str], Server], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a server that follows the bucket; and the copy is whole and verified."""
    for name, value in servers("s3").variables.items():
        monkeypatch.setenv(name, value)
    servers("s3").create("releases")
    require_rolled_back(run_as_written(commands(IN_A_BUCKET), desk))
    assert verify_release(Directory(desk / "copy"), "digits", load_trust(desk / "trust.toml")).version == 2


def test_the_commands_run_as_written_through_a_registry(table: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    """In one shell; by the tag and by the digest the same release comes, and it is promoted."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    with registry_server(tmp_path_factory.mktemp("registry")) as server:
        environment = {**os.environ, "PATH": path, "REGISTRY": server.host, "HOME": str(table)}
        lines = commands(IN_A_REGISTRY)
        assert [line.split()[1] for line in lines if line.startswith("dfmcl")][-2:] == ["verify", "promote"]
        done = subprocess.run(
            ["bash", "-euc", "\n".join(lines)], cwd=table, env=environment, capture_output=True, text=True, check=False
        )
    assert done.returncode == 0, done.stderr
    reference = done.stdout.splitlines()[0]
    assert f"latest: {reference}, model.onnx" in done.stdout
    assert f"pulled: {reference}, model.onnx" in done.stdout
    assert verify_release(Directory(table / "models"), "digits", load_trust(table / "trust.toml")).version == 1


def require_rolled_back(said: dict[str, str]) -> None:
    [live] = [text for line, text in said.items() if "next/candidate" in line and "--live" in line]
    assert "127.0.0.1:8001: answers with version 2" in live
    [history] = [text for line, text in said.items() if line.startswith("dfmcl history")]
    assert "rolled_back  version 1, before 2" in history
    assert "p99 doubled" in history
    [status] = [text for line, text in said.items() if line.startswith("dfmcl status")]
    assert "champion 2, previous 1" in status


def test_the_command_for_docker_is_a_hardened_one(tmp_path: Path) -> None:
    """Not root, read-only, without capabilities, on this machine's address only, and Triton takes nothing later."""
    [line] = [line for line in LINES if "--print-docker" in line]
    printed = subprocess.run(
        [str(Path(sys.executable).with_name("dfmcl")), *line.split()[1:]],
        cwd=tmp_path, capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    words = printed.replace("\\\n", " ").split()
    assert {"--user=1000:1000", "--read-only", "--cap-drop=ALL", "--model-control-mode=none"} <= set(words)
    assert all(word.startswith("--publish=127.0.0.1:") for word in words if word.startswith("--publish"))
    assert f"--volume={tmp_path / 'models'}:/models:ro" in words
