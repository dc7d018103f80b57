"""pip's Triton as a child process, for laptops and CI; clusters run NVIDIA's image.

That binary is older than known security fixes and has no C++ ONNX Runtime backend: it listens on 127.0.0.1 only,
loads nothing but what was promoted, and answers through `backend/model.py`.
"""

from __future__ import annotations

import ctypes
import os
import re
import secrets
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from tritonclient.utils import InferenceServerException

from dfmcl.common.errors import BadInput, Broken, Crashed, Rejected
from dfmcl.serving.clients.triton import Client
from dfmcl.serving.triton.environment import Environment, footprint, install_backends

HOST = "127.0.0.1"
# Whatever changes or reveals the server; inference, health, metadata and model-config stay open.
RESTRICTED = "model-repository,shared-memory,statistics,trace,logging"
KEY = "dfmcl"
ANSWER_SECONDS = 10.0  # of one inference here, which may wait behind full batches on a busy machine
LOAD_SECONDS = 120.0
# Of shared memory between Triton and its stub, from the start: where it had to grow from 1 MB while requests were
# in flight, the stub was seen to die of a segmentation fault, on a busy machine.
SHM_BYTES = 64 * 2**20
REAP_SECONDS = 0.5  # within which Triton waits for a backend that it ended itself; it takes milliseconds
STOP_SECONDS = 15.0  # for requests in flight, which Triton itself gives 10; then the process group is killed


@dataclass(frozen=True)
class Server:
    """A running tritonserver: its process, where it logs, its ports on 127.0.0.1, and what opens its load API."""

    process: subprocess.Popen[bytes]
    log: Path
    ports: dict[str, int]
    token: str

    def client(self, model: str) -> Client:
        """A client of one model; close it."""
        return Client(f"{HOST}:{self.ports['grpc']}", model, timeout_seconds=ANSWER_SECONDS)

    def require_running(self) -> None:
        """Raise Broken where the process has ended, Crashed where a signal ended it or its python backend.

        Triton itself calls a model ready whose backend is dead.
        """
        if (code := self.process.poll()) is not None:
            last = last_meaningful_line(self.log)
            if code < 0:
                raise Crashed(f"Triton was killed by signal {-code}: {last}")
            raise Broken(f"Triton ended with exit code {code}: {last}")
        if defunct(self.process.pid):
            last = last_meaningful_line(self.log)
            raise Crashed(f"a python backend of Triton's was killed or crashed; its log: {last}")

    def load(self, model: str) -> None:
        """Load what the repository says of a model now; requests go to the old version until the new one can answer.

        Rejected where Triton cannot load it: the old version, if there is one, goes on.
        """
        self._control(model, "load_model")

    def unload(self, model: str) -> None:
        """End a model, after the requests that are in flight."""
        self._control(model, "unload_model")

    def _control(self, model: str, action: str) -> None:
        headers = {f"triton-grpc-protocol-{KEY}": self.token}
        with self.client(model) as client:
            try:
                getattr(client.triton, action)(model, headers=headers, client_timeout=LOAD_SECONDS)
            except InferenceServerException as error:
                reason = " ".join(str(error.message()).split("\\n")[0].split())
                raise Rejected(f"model {model!r}: Triton could not load it: {reason}", "invalid") from None


@contextmanager
def running(
    environment: Environment, repository: Path, ports: dict[str, int], models: list[str], log: Path | None, fixed: bool
) -> Iterator[Server]:
    """A tritonserver that serves the named models; in the end it and all it left are gone.

    log: where Triton's own log goes (default: a file that vanishes with the server). fixed: control mode none, which
    loads everything in the repository once, and nothing later.
    """
    token = secrets.token_hex(16)
    with footprint() as runtime:
        install_backends(environment, runtime)
        command = server_command(environment, repository, runtime, ports, models, token, fixed=fixed)
        log = (log or runtime / "triton.log").absolute()
        with _process(command, environment.variables(), log) as process:
            yield Server(process, log, ports, token)


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
    environment: Environment,
    repository: Path,
    runtime: Path,
    ports: dict[str, int],
    names: list[str],
    token: str,
    *,
    fixed: bool = False,
) -> list[str]:
    """tritonserver's command line: on loopback, with the named models, and no way to bring in another but `token`."""
    mode = ["none"] if fixed else ["explicit", *(f"--load-model={name}" for name in names)]
    restriction = f"{RESTRICTED}:{KEY}={token}"
    return [
        str(environment.server / "bin" / "tritonserver"),
        f"--model-repository={repository.absolute()}",
        f"--model-control-mode={mode[0]}",
        *mode[1:],
        "--disable-auto-complete-config",
        f"--backend-directory={runtime}",
        f"--backend-config=python,shm-region-prefix-name={runtime.name}-",
        f"--backend-config=python,shm-default-byte-size={SHM_BYTES}",
        *(f"--{name}-address={HOST}" for name in ports),
        *(f"--{name}-port={port}" for name, port in ports.items()),
        f"--http-restricted-api={restriction}",
        f"--grpc-restricted-protocol={restriction}",
        "--allow-sagemaker=false",
        "--allow-vertex-ai=false",
        "--exit-timeout-secs=10",
    ]


def hide_token(server: Server) -> bool:
    """Overwrite the token in the process's arguments, which every user of the machine can read; False where the kernel
    does not allow it. Triton has read them by then, and takes the token from nowhere else."""
    process = Path("/proc", str(server.process.pid))
    try:
        begin = int((process / "stat").read_text().rpartition(")")[2].split()[45])  # arg_start, proc(5)
        arguments, token = (process / "cmdline").read_bytes(), server.token.encode()
        with (process / "mem").open("r+b", buffering=0) as memory:
            for found in re.finditer(token, arguments):
                memory.seek(begin + found.start())
                memory.write(b"*" * len(token))
    except (OSError, ValueError):
        return False
    return token not in (process / "cmdline").read_bytes()


def defunct(parent: int) -> set[int]:
    """Children of a process that died and whose end it does not take note of: Triton waits for its own victims."""
    if not (dead := _zombies(parent)):
        return dead
    time.sleep(REAP_SECONDS)
    return dead & _zombies(parent)


def _zombies(parent: int) -> set[int]:
    found = set()
    for children in Path("/proc", str(parent), "task").glob("*/children"):
        with suppress(OSError):  # the thread, or the process, has ended meanwhile
            for child in children.read_text().split():
                if Path("/proc", child, "stat").read_text().rpartition(")")[2].split()[0] == "Z":
                    found.add(int(child))
    return found


def last_meaningful_line(log: Path) -> str:
    """Triton's last error in a log, without its prefix; the last line where there is no error."""
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip(" +-|=")]
    errors = [line for line in lines if re.match(r"E\d{4} |error: ", line)]
    errors = [line for line in errors if "CudaDriverHelper" not in line]  # every machine without a GPU has that one
    line = (errors or lines or ["it wrote no log"])[-1]
    # A stub's traceback follows the error on the same line, with \\n for its line ends.
    return re.sub(r"^[A-Z]\d{4} \S+ \d+ \S+\] ", "", line).split("\\n")[0].strip(' "')


@contextmanager
def _process(command: list[str], variables: dict[str, str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Run Triton as a process group of its own; in the end stop it, then kill what is left of the group."""
    libc = ctypes.CDLL(None)
    try:
        log.parent.mkdir(parents=True, exist_ok=True)
        sink = log.open("ab")  # the one before it may have died, and said why
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
