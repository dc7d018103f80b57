"""Surrogate runs on disk, watch configurations, and a gRPC endpoint that answers, dawdles or lies as a test asks."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterator
from concurrent import futures
from functools import cache
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from tritonclient.grpc import service_pb2, service_pb2_grpc

from dfmcl.common.files import sha256_of
from dfmcl.monitoring import crafted
from dfmcl.monitoring.config import WatchConfig, load_config
from dfmcl.monitoring.surrogates import Surrogates, load_surrogates
from dfmcl.robustness.data import Dataset, load_dataset
from dfmcl.robustness.gradients import attack_pass
from dfmcl.robustness.models import Classifier, ModelSpec, to_float
from tests.exports import Export
from tests.monitoring.clocks import wait_for
from tests.monitoring.passed import CLASSES, SHAPE, oracle, write_report
from tests.monitoring.watching import Watching


@pytest.fixture(autouse=True)
def the_suites_threads() -> Iterator[None]:
    """A crafter sets the number of threads; other tests are calibrated with one."""
    yield
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def what_never_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Data, surrogates and their fast pass are prepared once for all sidecars of this process."""
    monkeypatch.setattr(crafted, "open_dataset", _loaded)
    monkeypatch.setattr(crafted, "load_surrogates", lambda runs, dataset: _stand_ins(tuple(runs)))
    monkeypatch.setattr(crafted, "attack_pass", lambda model, images: _fast(model))


@cache
def _loaded(*arguments: Any, **_how: Any) -> Dataset:
    return load_dataset(*arguments[:3])


@cache
def _stand_ins(runs: tuple[str, ...]) -> Surrogates:
    return load_surrogates(runs, load_dataset("digits"))


@cache
def _fast(model: torch.nn.Module) -> Any:
    return attack_pass(model, to_float(torch.from_numpy(load_dataset("digits").x_test[:8])))


def write_run(directory: Path, seed: int, width: int = 4, classes: int = CLASSES) -> Path:
    """A run in the training room's format, with seeded random weights, on the digits."""
    directory.mkdir(parents=True)
    torch.manual_seed(seed)
    spec = ModelSpec("resnet18", width, classes, SHAPE, (0.3, 0.3, 0.3), (0.4, 0.4, 0.4))
    save_file(Classifier(spec).state_dict(), directory / "checkpoint.safetensors")
    manifest = {
        "format": "dfmcl.run/1",
        "model": spec.to_json(),
        "labels": [str(label) for label in range(classes)],
        "data": load_dataset("digits").describe(),
        "files": {"checkpoint.safetensors": sha256_of(directory / "checkpoint.safetensors")},
        "config": {"curriculum": {"beta": "38/255"}},
    }
    (directory / "manifest.json").write_text(json.dumps(manifest))
    return directory


Answerer = Callable[[np.ndarray], np.ndarray]


class Endpoint(service_pb2_grpc.GRPCInferenceServiceServicer):
    """A real gRPC server that speaks Triton's protocol. answer: uint8 (N, H, W, C) to logits (N, K).

    refusal: status and text of what it answers instead. asked: images of each request; priorities: of each.
    """

    def __init__(self, answer: Answerer, port: int = 0) -> None:
        self.answer, self.version, self.requests, self.levels = answer, "1", 0, 0
        self.refusal: tuple[grpc.StatusCode, str] | None = None
        self.asked: list[int] = []
        self.priorities: list[int] = []
        self._server = grpc.server(futures.ThreadPoolExecutor(4))
        service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(self, self._server)
        self.port = self._server.add_insecure_port(f"127.0.0.1:{port}")
        self._server.start()

    def close(self) -> None:
        self._server.stop(0).wait()

    def ModelConfig(self, request: Any, context: Any) -> Any:
        response = service_pb2.ModelConfigResponse()
        response.config.max_batch_size = 64
        response.config.dynamic_batching.priority_levels = self.levels
        response.config.input.add(name="images", dims=SHAPE)
        response.config.output.add(name="logits", dims=[CLASSES])
        return response

    def ModelInfer(self, request: Any, context: Any) -> Any:
        self.requests += 1
        if self.refusal:
            context.abort(*self.refusal)
        shape = tuple(request.inputs[0].shape)
        self.asked.append(shape[0])
        self.priorities.append(request.parameters["priority"].uint64_param if "priority" in request.parameters else 0)
        logits = self.answer(np.frombuffer(request.raw_input_contents[0], np.uint8).reshape(shape))
        response = service_pb2.ModelInferResponse(model_name=request.model_name, model_version=self.version)
        if request.outputs[0].parameters["classification"].int64_param:
            entries = [f"{row[i]}:{i}:{i}".encode() for row in logits for i in np.argsort(-row)]
            response.outputs.add(name="logits", datatype="BYTES", shape=logits.shape)
            response.raw_output_contents.append(b"".join(struct.pack("<I", len(e)) + e for e in entries))
            return response
        response.outputs.add(name="logits", datatype="FP32", shape=logits.shape)
        response.raw_output_contents.append(logits.astype(np.float32).tobytes())
        return response


@pytest.fixture(scope="session")
def make_run(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`make_run(seed, width=4, classes=10)` writes a run of random weights."""
    folder = tmp_path_factory.mktemp("runs")
    return lambda seed, **options: write_run(folder / f"run{len(list(folder.iterdir()))}", seed, **options)


@pytest.fixture(scope="session")
def exported(
    make_run: Callable[..., Path], export_once: Export, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Path]:
    """A run of random weights and its really exported candidate."""
    run = make_run(7)
    return run, export_once(run, tmp_path_factory.mktemp("exported") / "candidate")


@pytest.fixture
def make_report(tmp_path: Path) -> Callable[..., Path]:
    """`make_report(checkpoint_sha256, **changes)` writes evidence of a passed gate, with top-level entries changed."""
    return lambda *arguments, **changes: write_report(tmp_path / "evidence", *arguments, **changes)


@pytest.fixture
def until() -> Callable[..., None]:
    """`until(condition, seconds)` waits for a condition, and fails where it does not come true."""
    return wait_for


@pytest.fixture(scope="session")
def surrogate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("monitoring") / "surrogate", seed=1)


@pytest.fixture
def start_endpoint() -> Iterator[Callable[..., Endpoint]]:
    """`start_endpoint(port=0)` starts a server that knows the digits; it ends with the test."""
    running: list[Endpoint] = []

    def start(port: int = 0) -> Endpoint:
        running.append(Endpoint(oracle, port))
        return running[-1]

    yield start
    for server in running:
        server.close()


@pytest.fixture
def endpoint(start_endpoint: Callable[..., Endpoint]) -> Endpoint:
    return start_endpoint()


WriteConfig = Callable[..., WatchConfig]
# Quick rounds that never rest, and that a busy machine's hiccups do not end.
QUICK: dict[str, dict[str, Any]] = {
    "target": {"model": "digits"},
    "data": {"name": "digits"},
    "threat": {"eps": "38/255"},
    "probe": {"interval_seconds": 0.05, "images": 8, "replay": 8, "attacks": ["mi-fgsm-2", "pgd-2"]},
    "budget": {"images": 1_000_000, "duty": 1.0},
    "abort": {"latency_factor": 1000.0},
    "listen": {"port": 0},
}


@pytest.fixture
def write_config(tmp_path: Path, surrogate: Path) -> WriteConfig:
    """`write_config(port, probe={"images": 4}, ...)` writes watch.toml for an endpoint's port and loads it."""

    def write(port: int, **sections: dict[str, Any]) -> WatchConfig:
        tables = {**QUICK, "surrogates": {"runs": [str(surrogate)]}}
        tables["target"] = tables["target"] | {"url": f"127.0.0.1:{port}"}
        for name, values in sections.items():
            tables[name] = tables.get(name, {}) | values
        lines = []
        for name, values in tables.items():
            lines += [f"[{name}]", *(f"{key} = {_toml(value)}" for key, value in values.items())]
        path = tmp_path / "watch.toml"
        path.write_text("\n".join(lines))
        return load_config(path)

    return write


def _toml(value: Any) -> str:
    return json.dumps(str(value) if isinstance(value, Path) else value)


@pytest.fixture
def start_watch() -> Iterator[Callable[..., Watching]]:
    """`start_watch(config, clock=time)` starts sidecars and ends them with the test."""
    running: list[Watching] = []

    def start(config: WatchConfig, **options: Any) -> Watching:
        running.append(Watching(config, **options))
        return running[-1].start()

    yield start
    for watching in running:
        watching.close()
