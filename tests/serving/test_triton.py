"""The local runtime: its answers, its refusals, its end."""

from __future__ import annotations

import base64
import json
import os
import re
import shutil
import signal
import socket
import sys
import threading
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dfmcl.common.errors import BadInput, Broken, Refused, Unavailable, WrongAnswer
from dfmcl.common.files import sha256_of
from dfmcl.gating.signing.attestation import Trust
from dfmcl.release.candidate import FILES
from dfmcl.release.promotion import promote
from dfmcl.release.stores.directory import Directory
from dfmcl.serving.clients.triton import Client
from dfmcl.serving.ready import read_ready
from dfmcl.serving.triton import environment, supervisor
from dfmcl.serving.triton import process as triton
from tests.processes import wait_until
from tests.serving.workshop import Served, command_of, private_of, processes_of, run_python, write_evidence
from tests.signing import report_on, write_report

ANYWHERE: dict[str, Any] = {"http_port": 0, "grpc_port": 0, "metrics_port": 0}


def post(url: str, body: object) -> int:
    """The status of a POST with a JSON body."""
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=10) as response:
            return int(response.status)
    except urllib.error.HTTPError as error:
        return error.code


def test_ready_file_tells_where_the_server_is(served: Served) -> None:
    """Its URLs answer, and it names what is served and who to stop."""
    assert served.ready["models"] == {"digits": 1}
    assert served.ready["pid"] == os.getpid()
    with urllib.request.urlopen(f"{served.ready['http']}/v2/models/digits/ready", timeout=10) as response:
        assert response.status == 200
    with urllib.request.urlopen(served.ready["metrics"], timeout=10) as response:
        metrics = response.read().decode()
    sha = sha256_of(served.repository / "digits" / "1" / "model.onnx")
    assert f'nv_inference_request_success{{_sha="{sha[:12]}",model="digits",version="1"}}' in metrics


@pytest.mark.parametrize("endpoint", ["http", "grpc", "metrics"])
def test_server_listens_on_one_address_only(served: Served, endpoint: str) -> None:
    """A server bound to all addresses would also accept on 127.0.0.2."""
    port = int(served.ready[endpoint].removesuffix("/metrics").rpartition(":")[2])
    socket.create_connection(("127.0.0.1", port), 5).close()
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.2", port), 5)


def test_ungated_model_cannot_be_loaded(served: Served, candidate: Path) -> None:
    """Triton's load API can carry a model; it is closed on HTTP and gRPC, and so is shared memory."""
    onnx = base64.b64encode((candidate / "model.onnx").read_bytes()).decode()
    config = json.dumps({"backend": "onnxruntime", "default_model_filename": "model.onnx"})
    url = f"{served.ready['http']}/v2/repository/models/evil/load"
    assert post(url, {"parameters": {"config": config, "file:1/model.onnx": onnx}}) == 403
    assert post(f"{served.ready['http']}/v2/repository/models/digits/unload", {}) == 403
    assert post(f"{served.ready['http']}/v2/systemsharedmemory/region/x/register", {}) == 403
    with Client(served.ready["grpc"], "digits") as client:
        with pytest.raises(Exception, match="restricted"):
            client.triton.load_model("evil", config=config, files={"file:1/model.onnx": b"x"})
        assert not client.triton.is_model_ready("evil")
        assert client.describe().version == "1"


def test_port_in_use_is_broken(repository: Path, needs_triton: None) -> None:
    """Exit code 5 with the option and the port, before anything is started."""
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(Broken, match=f"--grpc-port {port}: cannot listen") as caught:
            supervisor.serve(Directory(repository), http_port=0, grpc_port=port, metrics_port=0)
    assert caught.value.exit_code == 5


def test_missing_environment_is_broken(repository: Path, tmp_path: Path) -> None:
    """The message says how to get one."""
    with pytest.raises(Broken, match=r"make quickstart.*DFMCL_TRITON_PYTHON") as caught:
        supervisor.serve(Directory(repository), triton_python=tmp_path / "python", **ANYWHERE)
    assert caught.value.exit_code == 5


def test_environment_without_triton_is_broken(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The project's own interpreter is not Triton's."""
    monkeypatch.setenv("DFMCL_TRITON_PYTHON", sys.executable)
    with pytest.raises(Broken, match="not a Triton environment"):
        supervisor.serve(Directory(repository), **ANYWHERE)


def test_numpy_2_is_refused_by_the_backend(repository: Path, needs_triton: None, tmp_path: Path) -> None:
    """With numpy 2 in the stub, tensors would be corrupted silently; the model does not load instead."""
    found = environment.find_environment(None)
    if np.__version__.startswith("1.") or found.python_version != f"{sys.version_info[0]}.{sys.version_info[1]}":
        pytest.skip("needs numpy 2 here, for the python that Triton's environment has")
    ports = triton.claim_ports(http=0, grpc=0, metrics=0)
    variables = found.variables() | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    log = tmp_path / "log"
    with environment.footprint() as runtime:
        environment.install_backends(found, runtime)
        command = triton.server_command(found, repository, runtime, ports, ["digits"], "token")
        with triton._process(command, variables, log) as process:
            assert process.wait(30) != 0
    assert f"numpy {np.__version__} corrupts tensors" in log.read_text()


def test_empty_repository_is_bad_input(tmp_path: Path) -> None:
    """There is nothing to serve, and the message says how to change that."""
    with pytest.raises(BadInput, match="dfmcl promote"):
        supervisor.serve(Directory(tmp_path), **ANYWHERE)


def test_repository_with_a_stranger_is_refused(repository: Path) -> None:
    """A library that would replace the backend keeps the server from starting."""
    (repository / "digits" / "libtriton_onnxruntime.so").write_bytes(b"")
    with pytest.raises(Refused, match="promotion did not write this"):
        supervisor.serve(Directory(repository), **ANYWHERE)


def test_model_that_triton_cannot_load_is_broken(
    tmp_path: Path, candidate: Path, key: Path, trust: Trust, needs_triton: None
) -> None:
    """A server that does not come up ends with exit code 5 and Triton's own reason."""
    garbage = shutil.copytree(candidate, tmp_path / "candidate")
    evidence = write_evidence(tmp_path / "evidence", candidate, key)
    (garbage / "model.onnx").write_bytes(b"no model")
    files = {name: sha256_of(garbage / name) for name in FILES}
    manifest = json.loads((garbage / "manifest.json").read_text()) | {"files": files}
    (garbage / "manifest.json").write_text(json.dumps(manifest))
    write_report(evidence, report_on(garbage, evidence), key)
    promote(garbage, evidence, Directory(tmp_path / "models"), name="digits", trust=trust)
    with pytest.raises(Broken, match=r"Triton ended with exit code .*digits") as caught:
        Served(tmp_path / "models", tmp_path / "ready.json").start()
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "ready.json").exists()


def test_server_that_answers_otherwise_than_the_gate_saw_is_broken(repository: Path, needs_triton: None) -> None:
    """Before anyone is told that it is ready, its logits are compared with the recorded ones."""
    path = repository / "digits" / "1" / "probes.npz"
    with np.load(path) as probes:
        arrays = dict(probes)
    np.savez(path, **arrays | {name: arrays[name] + 1 for name in ("clean_logits", "adversarial_logits")})
    report = json.loads(path.with_name("report.json").read_text())
    report["files"]["probes.npz"] = sha256_of(path)
    path.with_name("report.json").write_text(json.dumps(report))
    with pytest.raises(WrongAnswer, match="off those the gate recorded"):
        Served(repository, repository.parent / "ready.json").start()


@pytest.mark.parametrize("victim", ["tritonserver", "triton_python_backend_stub"])
def test_killed_server_is_noticed(repository: Path, tmp_path: Path, needs_triton: None, victim: str) -> None:
    """Triton calls itself ready when its stub is dead; a real inference does not. Both deaths end with exit code 5."""
    server = Served(repository, tmp_path / "ready.json", liveness_seconds=0.2).start()
    marker = str(server.private)
    [process] = [
        pid for pid in processes_of(marker) if victim in Path(f"/proc/{pid}/cmdline").read_text().split("\0")[0]
    ]
    with Client(server.ready["grpc"], "digits") as client:
        client.describe()
        os.kill(process, signal.SIGKILL)
        error = server.result()
        with pytest.raises(Unavailable):
            client.describe()
    assert isinstance(error, Broken)
    assert error.exit_code == 5
    assert "\n" not in str(error)
    assert not server.ready_file.exists()
    assert processes_of(marker) == []


SERVE = """
import sys
from pathlib import Path
from dfmcl.release.stores.directory import Directory
from dfmcl.serving.triton.supervisor import serve
ports = {"http_port": 0, "grpc_port": int(sys.argv[4]), "metrics_port": 0}
sys.exit(serve(Directory(Path(sys.argv[1])), **ports, ready_file=Path(sys.argv[2]), log=Path(sys.argv[3])))
"""


@pytest.mark.parametrize("hangs", [False, True])
def test_what_a_killed_supervisor_leaves_does_not_stay(
    repository: Path, tmp_path: Path, needs_triton: None, request: pytest.FixtureRequest, hangs: bool
) -> None:
    """Its Triton ends with it; where that hangs, the next supervisor ends it, and has its ports. The ready file is not
    believed from the first moment on, and the next one removes it with the directories before it does anything."""
    ready, port = tmp_path / "ready.json", triton.claim_ports(grpc=0)["grpc"]
    process = run_python(SERVE, str(repository), str(ready), str(tmp_path / "triton.log"), str(port))
    request.addfinalizer(process.kill)
    wait_until(lambda: read_ready(ready), process)
    private = str(private_of(f"127.0.0.1:{port}"))
    commands = {pid: command_of(pid) for pid in processes_of(private)}
    [runtime] = {path for text in commands.values() for path in re.findall(r"--backend-directory=([^\0]+)", text)}
    if hangs:
        for pid in commands:
            os.kill(pid, signal.SIGSTOP)
    process.kill()
    process.wait()
    assert ready.exists()
    assert read_ready(ready) is None
    if not hangs:
        wait_until(lambda: not processes_of(private), seconds=30)
    server = Served(repository, ready, grpc_port=port).start()
    assert server.ready["pid"] == os.getpid()
    assert not processes_of(private)
    assert not Path(private).exists()
    assert not Path(runtime).exists()
    assert not list(environment.SHARED_MEMORY.glob(f"{Path(runtime).name}*"))
    assert not list(environment.SHARED_MEMORY.glob(f"{Path(private).name}*"))
    assert server.close() == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_stops_the_server_and_leaves_nothing(
    repository: Path, tmp_path: Path, needs_triton: None, number: signal.Signals, request: pytest.FixtureRequest
) -> None:
    """No process, no shared memory, no temporary directory, no ready file, and exit code 0."""
    ready, log = tmp_path / "ready.json", tmp_path / "triton.log"
    process = run_python(SERVE, str(repository), str(ready), str(log), "0")
    request.addfinalizer(process.kill)
    wait_until(ready.exists, process)
    private = str(private_of(json.loads(ready.read_text())["grpc"]))
    commands = "".join(map(command_of, processes_of(private)))
    [runtime] = {Path(path) for path in re.findall(r"--backend-directory=([^\0]+)", commands)}
    assert len(list(environment.SHARED_MEMORY.glob(f"{runtime.name}*"))) >= 2  # else this test proves nothing
    assert runtime.is_dir()
    process.send_signal(number)
    output, _ = process.communicate(timeout=30)
    assert process.returncode == 0, output
    assert "serving digits version 1" in output
    assert processes_of(private) == []
    assert not Path(private).exists()
    assert not list(environment.SHARED_MEMORY.glob(f"{runtime.name}*"))
    assert not runtime.exists()
    assert not ready.exists()
    assert "successfully loaded 'digits'" in log.read_text()


def test_footprint_of_a_dead_server_is_removed(tmp_path: Path) -> None:
    """What a killed server left is cleared by the next one, wherever its TMPDIR was; what a living one holds is not,
    and no lock file talks it into removing anything else."""
    mine, bystander = tmp_path / f"{environment.PREFIX}dead", tmp_path / "bystander"
    dead = [mine, *(environment.SHARED_MEMORY / f"{mine.name}{end}" for end in (".lock", "-region"))]
    mine.mkdir()
    bystander.mkdir()
    dead[1].write_text(str(mine))
    dead[2].write_bytes(b"")
    (environment.SHARED_MEMORY / f"{environment.PREFIX}liar.lock").write_text(str(bystander))
    with environment.footprint() as alive:
        region = environment.SHARED_MEMORY / f"{alive.name}-region"
        region.write_bytes(b"")
        with environment.footprint():
            assert region.exists()
            assert alive.is_dir()
            assert not any(path.exists() for path in dead)
            assert bystander.is_dir()
    assert not region.exists()
    assert not alive.exists()


def test_stop_before_ready_is_no_error(repository: Path, needs_triton: None) -> None:
    """A server that is stopped while it starts ends quietly."""
    stop = threading.Event()
    stop.set()
    assert supervisor.serve(Directory(repository), **ANYWHERE, stop=stop) == 0
