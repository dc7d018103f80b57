"""What the tests of this room are made with: a tiny run, evidence, a server in a thread, processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import torch
from safetensors.torch import save_file

from dfmcl.common.files import sha256_of
from dfmcl.gating.signing.attestation import Trust
from dfmcl.release.stores.directory import Directory
from dfmcl.robustness.data import load_dataset
from dfmcl.robustness.models import Classifier, ModelSpec
from dfmcl.serving.ready import read_ready
from dfmcl.serving.triton import supervisor
from tests.signing import report_on, write_report

ROOT = Path(__file__).parents[2]


def write_run(directory: Path, seed: int = 0) -> Path:
    """A run in the training room's format, with seeded random weights: width 4, on the digits."""
    directory.mkdir(parents=True)
    torch.manual_seed(seed)
    spec = ModelSpec("resnet18", 4, 10, (16, 16, 3), (0.3, 0.3, 0.3), (0.4, 0.4, 0.4))
    save_file(Classifier(spec).state_dict(), directory / "checkpoint.safetensors")
    data = load_dataset("digits")
    manifest = {
        "format": "dfmcl.run/1",
        "model": spec.to_json(),
        "labels": list(data.classes),
        "data": data.describe(),
        "files": {"checkpoint.safetensors": sha256_of(directory / "checkpoint.safetensors")},
        "config": {"curriculum": {"beta": "38/255"}},
    }
    (directory / "manifest.json").write_text(json.dumps(manifest))
    return directory


def write_evidence(directory: Path, candidate: Path, key: Path, verdict: str = "passed") -> Path:
    """Signed evidence in the gate's format: a verdict for a candidate's bytes, and probes ONNX Runtime answered."""
    directory.mkdir(parents=True)
    data = load_dataset("digits")
    images, labels = data.x_test[:80], data.y_test[:80]
    logits = onnx_logits(candidate / "model.onnx", images)
    np.savez(
        directory / "probes.npz",
        images=images,
        change=np.zeros_like(images),
        labels=labels,
        clean_logits=logits,
        adversarial_logits=logits,
    )
    return write_report(directory, report_on(candidate, directory, verdict), key)


def onnx_logits(model: Path, images: np.ndarray) -> np.ndarray:
    """The oracle: ONNX Runtime in this process."""
    (logits,) = ort.InferenceSession(model, providers=["CPUExecutionProvider"]).run(None, {"images": images})
    return np.asarray(logits)


@dataclass
class Served:
    """A served repository: the URLs of its ready file, and the thread that serves it."""

    repository: Path
    ready_file: Path
    liveness_seconds: float = 60.0
    trust: Trust | Callable[[], Trust] | None = None
    fixed: bool = False
    grpc_port: int = 0
    restarts: int = 0
    said: list[str] = field(default_factory=list)
    stop: threading.Event = field(default_factory=threading.Event)
    ready: dict[str, Any] = field(default_factory=dict)
    outcome: list[Any] = field(default_factory=list)

    def start(self) -> Served:
        """Serve in a thread; returns when the ready file is there and its own, raises what `serve` raised."""
        self.thread = threading.Thread(target=self._serve)
        self.thread.start()
        while (said := read_ready(self.ready_file)) is None:
            if self.outcome:
                raise self.outcome[0]
            time.sleep(0.02)  # it announces itself by a file, to tests as to users
        self.ready = said
        return self

    @property
    def private(self) -> Path:
        """Where its Triton reads; in the arguments of every process that it has."""
        return private_of(self.ready["grpc"])

    def _serve(self) -> None:
        trust = self.trust
        try:
            code = supervisor.serve(
                Directory(self.repository),
                http_port=0,
                grpc_port=self.grpc_port,
                metrics_port=0,
                ready_file=self.ready_file,
                stop=self.stop,
                log=self.ready_file.with_name("triton.log"),
                say=self.said.append,
                fixed=self.fixed,
                trust=(lambda: trust) if isinstance(trust, Trust) else trust,
                restarts=self.restarts,
                liveness_seconds=self.liveness_seconds,
            )
            self.outcome.append(code)
        except Exception as error:  # noqa: BLE001 - handed to the test's own thread
            self.outcome.append(error)

    def result(self) -> object:
        """What `serve` returned or raised, once it ended."""
        self.thread.join(60)
        return self.outcome[0]

    def close(self) -> object:
        """Stop serving."""
        self.stop.set()
        return self.result()


def processes_of(marker: str) -> list[int]:
    """Ids of the living processes whose command line holds a text."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if marker.encode() in path.read_bytes() and int(path.parent.name) != os.getpid():
                found.append(int(path.parent.name))
        except OSError:  # it ended meanwhile
            continue
    return found


def command_of(process: int) -> str:
    """Its command line, words between zero bytes; empty where it has ended."""
    try:
        return Path(f"/proc/{process}/cmdline").read_text()
    except OSError:
        return ""


def private_of(url: str) -> Path:
    """The private directory of the server that answers at a gRPC address."""
    port = f"--grpc-port={url.rpartition(':')[2]}"
    [command] = [text for text in map(command_of, processes_of(port)) if "tritonserver" in text]
    return Path(command.partition("--model-repository=")[2].partition("\0")[0]).parent


def run_python(code: str, *arguments: str) -> subprocess.Popen[str]:
    """A fresh interpreter that runs code in the repository's root."""
    return subprocess.Popen(
        [sys.executable, "-c", code, *arguments], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
