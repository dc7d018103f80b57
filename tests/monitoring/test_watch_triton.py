"""The sidecar beside a real Triton that is up, killed, and back."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
from prometheus_client.parser import text_string_to_metric_families as parse

from monitoring.probes import transfer_attack
from monitoring.rounds import Plan, RoundResult, round_from_json, run_round
from monitoring.surrogates import load_surrogates
from robustness.data import load_dataset
from robustness.files import sha256_of
from serving import environment, promotion
from serving.client import Answer, Client
from serving.errors import Broken
from tests.serving.traffic import Traffic
from tests.signing import make_key, report_on, trusting, write_report

Make = Callable[..., Any]
ROOT = Path(__file__).parents[2]
SERVE = (
    "import sys; from pathlib import Path; from serving.supervisor import serve;"
    "serve(Path(sys.argv[1]), http_port=0, grpc_port=int(sys.argv[2]), metrics_port=0, ready_file=Path(sys.argv[3]),"
    "restarts=0)"
)


@pytest.fixture(scope="module", autouse=True)
def needs_triton() -> None:
    """Skips these tests on machines without the Triton environment."""
    try:
        environment.find_environment(None)
    except Broken as error:
        pytest.skip(str(error))


@pytest.fixture
def repository(tmp_path: Path, exported: tuple[Path, Path]) -> Path:
    """A run of random weights, exported and promoted with evidence that says it passed."""
    run, candidate = exported
    evidence, key = tmp_path / "evidence", make_key(tmp_path)
    evidence.mkdir()
    images = load_dataset("digits").x_test[:64]
    logits = predictor(candidate / "model.onnx")(images).logits
    probes = {"images": images, "adversarial": images, "clean_logits": logits, "adversarial_logits": logits}
    np.savez(evidence / "probes.npz", **probes)
    checkpoint = {"checkpoint_sha256": sha256_of(run / "checkpoint.safetensors")}
    write_report(evidence, report_on(candidate, evidence, run=checkpoint), key)
    promotion.promote(candidate, evidence, tmp_path / "models", name="digits", trust=trusting(key))
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


def figures(text: str) -> dict[str, float]:
    """Samples of the exposition by name and reason."""
    return {
        f"{sample.name} {sample.labels.get('reason', '')}".strip(): sample.value
        for family in parse(text)
        for sample in family.samples
    }


def test_metrics_while_triton_is_up_killed_and_back(
    serve: Make, repository: Path, surrogate: Path, write_config: Make, start_watch: Make, until: Make
) -> None:
    """target_up goes 1, 0, 1; failures are counted by reason; the figures are those that ONNX Runtime gives."""
    process, ready = serve(0)
    port = int(ready["grpc"].rpartition(":")[2])
    config = write_config(port, images=64, interval=0.3, timeout=2.0, evidence=repository / "digits" / "1")
    watching = start_watch(config)

    def metric(name: str) -> float:
        return figures(watching.get("/metrics")[0])[f"robustness_{name}"]

    until(lambda: watching.get("/rounds.json")[0] != "[]\n")
    assert metric("target_up") == 1
    assert metric("gate_threshold_ratio") == 0.45
    first = round_from_json(json.loads(watching.get("/rounds.json")[0])[0])
    expected = expected_round(config, surrogate, repository / "digits" / "1" / "model.onnx")
    assert isinstance(first, RoundResult)
    assert (first.version, first.correct, first.attacks) == ("1", expected.correct, expected.attacks)
    assert 0 < first.clean.k < 64  # so that the comparison above says something

    (triton,) = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(triton), signal.SIGKILL)  # `serve` then ends by itself and clears what is left
    process.wait(30)
    until(lambda: metric("target_up") == 0)
    stood, failed = metric("probe_last_success_timestamp_seconds"), failures(watching)
    until(lambda: failures(watching) >= failed + 2)
    assert metric("probe_last_success_timestamp_seconds") == stood
    assert metric("probe_round_failures_total unavailable") >= 2
    assert metric("probe_last_attempt_timestamp_seconds") > stood
    assert watching.get("/-/healthy")[0] == "healthy\n"

    serve(port)
    until(lambda: metric("target_up") == 1)
    assert metric("probe_last_success_timestamp_seconds") > stood
    assert watching.close() == 0


def test_a_sidecar_that_is_killed_costs_users_nothing(
    serve: Make, repository: Path, write_config: Make, until: Make, tmp_path: Path
) -> None:
    """In the middle of a round, with its requests on the way: all that users ask is answered, and rightly."""
    _, ready = serve(0)
    write_config(int(ready["grpc"].rpartition(":")[2]), images=64, interval=0.05)
    images = load_dataset("digits").x_test[:8]
    expected = {"1": predictor(repository / "digits" / "1" / "model.onnx")(images).logits}

    def make() -> Callable[[], tuple[str, np.ndarray]]:
        client = Client(ready["grpc"], "digits", timeout_seconds=10)

        def ask() -> tuple[str, np.ndarray]:
            answer = client.predict(images)
            return answer.version, answer.logits

        return ask

    command = [Path(sys.executable).with_name("dfmcl"), "watch", "--config", tmp_path / "watch.toml"]
    log = tmp_path / "watch.log"
    with log.open("w") as said, Traffic(make, expected) as traffic:
        watching = subprocess.Popen(command, cwd=ROOT, stdout=said, stderr=said)
        try:
            until(lambda: watching.poll() is not None or "round" in log.read_text(), 60)
            traffic.mark("it attacks")
        finally:
            watching.kill()
        assert watching.wait() == -signal.SIGKILL
        traffic.mark("it is gone")
    assert traffic.failures == []


def failures(watching: Any) -> float:
    found = figures(watching.get("/metrics")[0])
    return sum(value for name, value in found.items() if name.startswith("robustness_probe_round_failures_total"))


def expected_round(config: Any, surrogate: Path, model: Path) -> RoundResult:
    """The first round with the same bytes, through ONNX Runtime in this process."""

    class Clock:
        def time(self) -> float:
            return 0.0

        monotonic = time

    data = load_dataset("digits")
    plan = Plan(
        model="digits",
        images=data.x_test,
        labels=data.y_test,
        classes=10,
        source=load_surrogates([surrogate], data).model,
        threat=config.threat.threat,
        attacks=tuple(transfer_attack(name) for name in config.probe.attacks),
        images_per_round=64,
        seed=0,
    )
    result = run_round(plan, 1, predict=predictor(model), clock=Clock())
    assert isinstance(result, RoundResult)
    return result
