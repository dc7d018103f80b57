"""The sidecar beside a real Triton that is up, killed, and back."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
import torch

from dfmcl.common.errors import Broken
from dfmcl.common.files import sha256_of
from dfmcl.gating.signing.report import RunEntry
from dfmcl.monitoring.crafting import ImagePool, scenes
from dfmcl.monitoring.releases import follow
from dfmcl.monitoring.results import RoundResult
from dfmcl.monitoring.rounds import RoundPlan, run_round
from dfmcl.monitoring.surrogates import load_surrogates
from dfmcl.release import promotion
from dfmcl.release.stores.directory import Directory
from dfmcl.robustness.attacks.registry import Attack
from dfmcl.robustness.data import load_dataset
from dfmcl.robustness.gradients import attack_pass
from dfmcl.robustness.models import to_float
from dfmcl.serving.clients.triton import Answer, Client
from dfmcl.serving.triton import environment
from tests.monitoring.clocks import Still
from tests.monitoring.greys import manners
from tests.serving.traffic import Traffic
from tests.serving.workshop import private_of, processes_of
from tests.signing import make_key, report_on, trusting, write_report, write_trust

Make = Callable[..., Any]
ROOT = Path(__file__).parents[2]
SERVE = (
    "import sys; from pathlib import Path; from dfmcl.serving.triton.supervisor import serve;"
    "from dfmcl.release.stores.directory import Directory; ports = dict(http_port=0, metrics_port=0);"
    "serve(Directory(Path(sys.argv[1])), **ports, grpc_port=int(sys.argv[2]), ready_file=Path(sys.argv[3]),"
    "restarts=0, liveness_seconds=600)"
)


@pytest.fixture(scope="module", autouse=True)
def needs_triton() -> None:
    """Skips these tests on machines without the Triton environment."""
    try:
        environment.find_environment(None)
    except Broken as error:
        pytest.skip(str(error))  # which says what is missing and how to get it


@pytest.fixture
def repository(tmp_path: Path, exported: tuple[Path, Path]) -> Path:
    """A run of random weights, exported and promoted with evidence that says it passed."""
    run, candidate = exported
    evidence, key = tmp_path / "evidence", make_key(tmp_path)
    evidence.mkdir()
    images = load_dataset("digits").x_test[:64]
    logits = predictor(candidate / "model.onnx")(images).logits
    probes = {"images": images, "change": np.zeros_like(images), "labels": np.zeros(64, np.int64)}
    probes |= {"clean_logits": logits, "adversarial_logits": logits}
    np.savez(evidence / "probes.npz", **probes)
    checkpoint = RunEntry(checkpoint_sha256=sha256_of(run / "checkpoint.safetensors"))
    write_report(evidence, report_on(candidate, evidence, run=checkpoint), key)
    promotion.promote(candidate, evidence, Directory(tmp_path / "models"), name="digits", trust=trusting(key))
    return tmp_path / "models"


def predictor(model: Path) -> Callable[[np.ndarray], Answer]:
    """The oracle: ONNX Runtime in this process."""
    session = ort.InferenceSession(str(model), providers=["CPUExecutionProvider"])
    return lambda images: Answer(session.run(None, {"images": images})[0], "1")


@pytest.fixture
def serve(tmp_path: Path, repository: Path, until: Make) -> Iterator[Callable[[int], tuple[Any, dict[str, Any]]]]:
    """`serve(port)` runs a server in a process of its own until it answers; returns process and ready file."""
    running: list[subprocess.Popen[bytes]] = []

    def start(port: int) -> tuple[subprocess.Popen[bytes], dict[str, Any]]:
        ready = tmp_path / f"ready{len(running)}.json"
        command = [sys.executable, "-c", SERVE, str(repository), str(port), str(ready)]
        running.append(subprocess.Popen(command, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}))
        until(lambda: ready.exists() or running[-1].poll() is not None, 120)
        return running[-1], json.loads(ready.read_text())

    yield start
    for process in running:
        if process.poll() is None:
            process.terminate()
        process.wait(60)


@pytest.fixture
def release(repository: Path, tmp_path: Path) -> dict[str, Path]:
    """Where the evidence lies, and whom to trust."""
    return {"repository": repository, "trust": write_trust(tmp_path / "release.key")}


def failures(found: dict[str, float]) -> float:
    """Failed rounds of all reasons, in one look."""
    return sum(value for name, value in found.items() if name.startswith("robustness_probe_round_failures_total"))


def test_metrics_while_triton_is_up_killed_and_back(
    serve: Make, repository: Path, release: Any, surrogate: Path, write_config: Make, start_watch: Make, until: Make
) -> None:
    """target_up goes 1, 0, 1; failures are counted by reason; the figures are those that ONNX Runtime gives, and the
    recorded answers are the recorded ones."""
    process, ready = serve(0)
    port = int(ready["grpc"].rpartition(":")[2])
    config = write_config(
        port, probe={"images": 64, "interval_seconds": 0.3}, target={"timeout_seconds": 10.0}, release=release
    )
    watching = start_watch(config)
    until(lambda: watching.get("/rounds.json")[0] != "[]\n", 60)
    found = watching.metrics()
    assert found["robustness_target_up triton"] == 1
    assert found["robustness_gate_verified"] == 1
    assert found["robustness_target_integrity"] == 1
    assert found["robustness_gate_threshold_ratio"] == 0.45
    first = watching.rounds()[0]
    expected = expected_round(config, surrogate, repository)
    assert isinstance(first, RoundResult)
    assert (first.version, first.correct, first.attacks) == ("1", expected.correct, expected.attacks)
    assert 0 < first.clean.k < 64  # so that the comparison above says something
    assert first.replay is not None
    assert (first.replay.images, first.replay.mismatches) == (8, 0)

    (triton,) = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(triton), signal.SIGKILL)  # `serve` then ends by itself and clears what is left
    process.wait(60)
    until(lambda: watching.metric("target_up triton") == 0, 60)
    stood, failed = watching.metric("probe_last_success_timestamp_seconds triton"), failures(watching.metrics())
    until(lambda: failures(watching.metrics()) >= failed + 2, 60)
    assert watching.metric("probe_last_success_timestamp_seconds triton") == stood
    assert watching.metric("probe_round_failures_total triton unavailable") >= 2
    assert watching.metric("probe_last_attempt_timestamp_seconds triton") > stood
    assert watching.get("/-/healthy")[0] == "healthy\n"

    serve(port)
    until(lambda: watching.metric("target_up triton") == 1, 60)
    assert watching.metric("probe_last_success_timestamp_seconds triton") > stood
    assert watching.close() == 0


def test_a_hung_stub_is_seen_where_readiness_is_not(
    serve: Make, write_config: Make, start_watch: Make, until: Make
) -> None:
    """Triton calls itself ready while the process that computes stands still; the sidecar, which asks, says that it is
    down."""
    _, ready = serve(0)
    config = write_config(
        int(ready["grpc"].rpartition(":")[2]), probe={"interval_seconds": 0.3}, target={"timeout_seconds": 5.0}
    )
    watching = start_watch(config)
    until(lambda: watching.metrics().get("robustness_target_up triton") == 1, 60)
    [stub] = [
        process
        for process in processes_of(str(private_of(ready["grpc"])))
        if "triton_python_backend_stub" in Path(f"/proc/{process}/cmdline").read_text().split("\0")[0]
    ]
    os.kill(stub, signal.SIGSTOP)
    try:
        until(lambda: watching.metric("target_up triton") == 0, 60)
        with urllib.request.urlopen(f"{ready['http']}/v2/health/ready", timeout=10) as response:
            assert response.status == 200
    finally:
        with suppress(ProcessLookupError):  # `dfmcl serve` may have found it too, and replaced it
            os.kill(stub, signal.SIGCONT)
    found = watching.metrics()  # once: rounds go on failing between two looks
    outages = ("server_error", "unavailable", "timeout")
    assert sum(found[f"robustness_probe_round_failures_total triton {reason}"] for reason in outages) >= 1
    assert failures(found) == sum(found[f"robustness_probe_round_failures_total triton {reason}"] for reason in outages)


def test_a_sidecar_that_is_killed_costs_users_nothing(
    serve: Make, repository: Path, write_config: Make, until: Make, tmp_path: Path
) -> None:
    """In the middle of a round, with its requests on the way: all that users ask is answered, and rightly."""
    _, ready = serve(0)
    write_config(int(ready["grpc"].rpartition(":")[2]), probe={"images": 64}, target={"timeout_seconds": 30.0})
    images = load_dataset("digits").x_test[:8]
    expected = {"1": predictor(repository / "digits" / "1" / "model.onnx")(images).logits}

    def make() -> Callable[[], tuple[str, np.ndarray]]:
        client = Client(ready["grpc"], "digits", timeout_seconds=30)

        def ask() -> tuple[str, np.ndarray]:
            answer = client.predict(images)
            return answer.version, answer.logits

        return ask

    command = [str(Path(sys.executable).with_name("dfmcl")), "watch", "--config", str(tmp_path / "watch.toml")]
    log = tmp_path / "watch.log"
    with log.open("w") as said, Traffic(make, expected) as traffic:
        watching = subprocess.Popen(command, cwd=ROOT, stdout=said, stderr=said)
        try:
            until(lambda: watching.poll() is not None or "round" in log.read_text(), 300)
            traffic.mark("it attacks")
        finally:
            watching.kill()
        assert watching.wait() == -signal.SIGKILL, log.read_text()
        traffic.mark("it is gone")
    assert traffic.failures == []


def expected_round(config: Any, surrogate: Path, repository: Path) -> RoundResult:
    """The first round with the same bytes, through ONNX Runtime in this process."""
    data = load_dataset("digits")
    attacks = tuple(Attack.parse_transfer(name) for name in config.probe.attacks)
    plan = RoundPlan("digits", 10, config.threat.threat, attacks, images=64)
    source = attack_pass(load_surrogates([surrogate], data).model, to_float(torch.from_numpy(data.x_test[:8])))
    pool = ImagePool(data.x_test, data.y_test, 10)
    torch.set_num_threads(config.probe.threads)  # as the crafter does: sums depend on it
    scene = next(scenes(pool, source, plan.threat, attacks, seed=0, count=64))
    predict = predictor(repository / "digits" / "1" / "model.onnx")
    result = run_round(plan, 1, scene, predict, follow(Directory(repository), "digits", None), Still(), manners())
    assert isinstance(result, RoundResult)
    return result
