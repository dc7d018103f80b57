"""The local runtime: pip's Triton as a child process, for laptops and CI; clusters run NVIDIA's image.

That binary is older than known security fixes and has no C++ ONNX Runtime backend: it listens on 127.0.0.1 only,
loads nothing but what was promoted, and answers through `backend/model.py`.
"""

from __future__ import annotations

import ctypes
import json
import os
import re
import secrets
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from serving import repository as layout
from serving.client import Client
from serving.environment import Environment, find_environment, footprint, install_backends
from serving.errors import AnswerError, BadInput, Broken
from serving.promotion import Promoted, verify_release

HOST = "127.0.0.1"
# Whatever changes or reveals the server; inference, health, metadata and model-config stay open.
RESTRICTED = "model-repository,shared-memory,statistics,trace,logging"
STARTUP_SECONDS = 120.0
ANSWER_SECONDS = 10.0  # of one inference here, which may wait behind full batches on a busy machine
LIVENESS_SECONDS = 5.0
LIVENESS_FAILURES = 3
STOP_SECONDS = 15.0  # for requests in flight, which Triton itself gives 10; then the process group is killed
KNOWN_ANSWERS = 64  # one full batch of the gate's probes
# Of the largest logit: batch shape and threads reorder float32 sums, about 1e-6; another model is whole logits away.
KNOWN_ANSWER_TOLERANCE = 1e-3


@dataclass(frozen=True)
class Server:
    """A running tritonserver: its process, where it logs, and a client of each model it should serve."""

    process: subprocess.Popen[bytes]
    log: Path
    clients: dict[str, Client]

    def require_running(self) -> None:
        """Raise Broken where the process has ended."""
        if (code := self.process.poll()) is not None:
            how = f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
            raise Broken(f"Triton {how}: {last_meaningful_line(self.log)}")


def serve(
    repository: Path,
    *,
    http_port: int = 8000,
    grpc_port: int = 8001,
    metrics_port: int = 8002,
    triton_python: Path | None = None,
    ready_file: Path | None = None,
    log: Path | None = None,
    stop: threading.Event | None = None,
    say: Callable[[str], None] = print,
    liveness_seconds: float = LIVENESS_SECONDS,
) -> int:
    """Serve every promoted model until SIGTERM, SIGINT or `stop`; returns 0 then, and leaves no process behind.

    A port of 0 means any free one. ready_file: JSON {http, grpc, metrics, pid, models}, there only while the server
    answers. log: where Triton's own log goes (default: a file that vanishes with the server). stop: for callers
    outside the main thread, which get no signals. Raises Refused (1) for a model that promotion did not write,
    BadInput (2) for a repository without models, Broken (5) for a missing environment, a port in use, a server that
    does not come up, gives other answers than the gate recorded, or dies.
    """
    names = layout.model_names(repository)
    if not names:
        raise BadInput(f"{repository}: holds no promoted model; `dfmcl promote` adds one")
    releases = [verify_release(repository, name) for name in names]
    environment = find_environment(triton_python)
    ports = claim_ports(http=http_port, grpc=grpc_port, metrics=metrics_port)
    with ExitStack() as stack:
        stop = stop or stack.enter_context(_stop_on_signals())
        runtime = stack.enter_context(footprint())
        install_backends(environment, runtime)
        command = server_command(environment, repository, runtime, ports, names)
        log = (log or runtime / "triton.log").absolute()
        process = stack.enter_context(_running(command, environment.variables(), log))
        clients = {
            name: stack.enter_context(Client(f"{HOST}:{ports['grpc']}", name, timeout_seconds=ANSWER_SECONDS))
            for name in names
        }
        server = Server(process, log, clients)
        deadline = time.monotonic() + STARTUP_SECONDS
        if all(_answers_as_gated(server, release, stop, deadline) for release in releases):
            stack.enter_context(_announced(ports, releases, ready_file, say))
            _watch(server, releases, stop, liveness_seconds)
    return 0


def claim_ports(**wanted: int) -> dict[str, int]:
    """Ports on 127.0.0.1 by name, each free at this moment; 0 becomes a free one. Broken where one is in use."""
    found = {}
    with ExitStack() as stack:
        for name, port in wanted.items():
            listener = stack.enter_context(socket.socket())
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # closed connections may linger
            try:
                listener.bind((HOST, port))
            except OverflowError:
                raise BadInput(f"--{name}-port {port}: must be from 0 to 65535") from None
            except OSError as error:
                raise Broken(
                    f"--{name}-port {port}: cannot listen on {HOST}:{port} ({error.strerror}); name another, or 0"
                ) from None
            found[name] = listener.getsockname()[1]
    return found


def server_command(
    environment: Environment, repository: Path, runtime: Path, ports: dict[str, int], names: list[str]
) -> list[str]:
    """tritonserver's command line: on loopback, with the named models, and no way to bring in another."""
    restriction = f"{RESTRICTED}:dfmcl={secrets.token_hex(16)}"  # a token that nobody keeps: closed to everyone
    return [
        str(environment.server / "bin" / "tritonserver"),
        f"--model-repository={repository.absolute()}",
        "--model-control-mode=explicit",
        *(f"--load-model={name}" for name in names),
        "--disable-auto-complete-config",
        f"--backend-directory={runtime}",
        f"--backend-config=python,shm-region-prefix-name={runtime.name}-",
        *(f"--{name}-address={HOST}" for name in ports),
        *(f"--{name}-port={port}" for name, port in ports.items()),
        f"--http-restricted-api={restriction}",
        f"--grpc-restricted-protocol={restriction}",
        "--allow-sagemaker=false",
        "--allow-vertex-ai=false",
        "--exit-timeout-secs=10",
    ]


def last_meaningful_line(log: Path) -> str:
    """Triton's last error in a log, without its prefix; the last line where there is no error."""
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip(" +-|=")]
    errors = [line for line in lines if re.match(r"E\d{4} |error: ", line)]
    errors = [line for line in errors if "CudaDriverHelper" not in line]  # every machine without a GPU has that one
    line = (errors or lines or ["it wrote no log"])[-1]
    # A stub's traceback follows the error on the same line, with \\n for its line ends.
    return re.sub(r"^[A-Z]\d{4} \S+ \d+ \S+\] ", "", line).split("\\n")[0].strip(' "')


def known_answers(release: Promoted) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.float32]]:
    """Images (n, H, W, C) and logits (n, K) that the gate recorded for a version, 1 <= n <= 64."""
    path = release.path / layout.PROBES
    try:
        with np.load(path, allow_pickle=False) as probes:
            images, logits = probes["images"][:KNOWN_ANSWERS], probes["clean_logits"][:KNOWN_ANSWERS]
    except (OSError, ValueError, KeyError) as error:
        raise BadInput(f"{path}: not the gate's probes ({error}); promote again") from None
    if len(images) == 0 or len(images) != len(logits):
        raise BadInput(f"{path}: {len(images)} images and {len(logits)} rows of logits; promote again")
    return images, logits


@contextmanager
def _stop_on_signals() -> Iterator[threading.Event]:
    stop = threading.Event()

    def handle(number: int, frame: object) -> None:
        # In a thread: the signal may interrupt stop.wait() while that holds the lock which set() needs.
        threading.Thread(target=stop.set).start()

    previous = {number: signal.signal(number, handle) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield stop
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


@contextmanager
def _running(command: list[str], variables: dict[str, str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Run Triton as a process group of its own; in the end stop it, then kill what is left of the group."""
    libc = ctypes.CDLL(None)
    try:
        log.parent.mkdir(parents=True, exist_ok=True)
        sink = log.open("wb")
    except OSError as error:
        raise Broken(f"{log}: cannot be written: {error.strerror}") from None
    with sink:
        process = subprocess.Popen(
            command,
            env=variables,
            stdin=subprocess.DEVNULL,
            stdout=sink,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C then reaches us alone, and we decide the order of things
            preexec_fn=lambda: libc.prctl(1, signal.SIGTERM),  # PR_SET_PDEATHSIG: it ends even when we are killed
        )
    patience = 0.0  # a server that failed is not waited for
    try:
        yield process
        patience = STOP_SECONDS
    finally:
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(patience)
        with suppress(ProcessLookupError):  # nobody is left, as it should be
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _answers_as_gated(server: Server, release: Promoted, stop: threading.Event, deadline: float) -> bool:
    """Wait until a model gives the answers that the gate recorded: Triton's own health says ready when it is not.

    False where `stop` came first. Raises Broken where it does not answer until the deadline, or answers differently.
    """
    images, expected = known_answers(release)
    while not stop.is_set():
        server.require_running()
        try:
            answer = server.clients[release.model].predict(images)
        except AnswerError as error:
            if time.monotonic() > deadline:
                raise Broken(f"Triton did not come up: {error}; its log: {last_meaningful_line(server.log)}") from None
            stop.wait(0.2)
            continue
        difference = float(np.abs(answer.logits - expected).max())
        tolerance = KNOWN_ANSWER_TOLERANCE * max(1.0, float(np.abs(expected).max()))
        if difference <= tolerance and answer.version == str(release.version):
            return True
        raise Broken(
            f"model {release.model!r}, version {answer.version}: logits are {difference:.3g} off those the gate "
            f"recorded for version {release.version} (tolerance {tolerance:.3g}); reinstall the Triton environment"
        )
    return False


@contextmanager
def _announced(
    ports: dict[str, int], releases: list[Promoted], ready_file: Path | None, say: Callable[[str], None]
) -> Iterator[None]:
    """Say where the server is, and keep it in ready_file for as long as it is there."""
    urls = {
        "http": f"http://{HOST}:{ports['http']}",
        "grpc": f"{HOST}:{ports['grpc']}",
        "metrics": f"http://{HOST}:{ports['metrics']}/metrics",
    }
    for release in releases:
        say(f"serving {release.model} version {release.version} (sha256 {release.sha256[:12]})")
    for label, url in urls.items():
        say(f"{label:>9}  {url}")
    if ready_file is None:
        yield
        return
    models = {release.model: release.version for release in releases}
    staged = ready_file.with_name(f".{ready_file.name}.{os.getpid()}.part")
    try:
        ready_file.parent.mkdir(parents=True, exist_ok=True)
        staged.write_text(json.dumps({**urls, "pid": os.getpid(), "models": models}, indent=2) + "\n")
        staged.replace(ready_file)
    except OSError as error:
        raise Broken(f"{ready_file}: cannot be written: {error.strerror}") from None
    try:
        yield
    finally:
        ready_file.unlink(missing_ok=True)


def _watch(server: Server, releases: list[Promoted], stop: threading.Event, liveness_seconds: float) -> None:
    """Until `stop`: raise Broken when the process ends, or a model fails real inferences several times in a row."""
    images = {release.model: known_answers(release)[0][:1] for release in releases}
    failures = dict.fromkeys(images, 0)
    due = time.monotonic() + liveness_seconds
    while not stop.wait(min(0.5, liveness_seconds)):
        server.require_running()
        if time.monotonic() < due:
            continue
        for model, image in images.items():
            try:
                server.clients[model].predict(image)
                failures[model] = 0
            except AnswerError as error:
                failures[model] += error.reason != "queue_full"  # a full queue is a busy server, not a dead one
                if failures[model] >= LIVENESS_FAILURES:
                    last = last_meaningful_line(server.log)
                    raise Broken(f"{error}; {LIVENESS_FAILURES} times in a row; its log: {last}") from None
        due = time.monotonic() + liveness_seconds
