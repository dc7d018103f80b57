"""The pip environment that holds Triton, and what a server needs from it: backends, variables, and a place to run."""

from __future__ import annotations

import fcntl
import json
import os
import secrets
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from dfmcl.common.errors import Broken

BACKEND = Path(__file__).parent / "backend" / "model.py"
SHARED_MEMORY = Path("/dev/shm")  # Triton's python backend keeps its regions there and nowhere else
PREFIX = "dfmcl-triton-"
END_SECONDS = 5.0  # for the kernel to clear away what was killed
INSTALL = (
    "run `make quickstart`, or install serving/triton/requirements.txt into .venv-triton, or set DFMCL_TRITON_PYTHON"
)
QUESTION = """
import json, sys, sysconfig
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
versions = {name: version(name) for name in ("nvidia-pytriton", "numpy")}
import onnxruntime
print(json.dumps({
    "python": "%d.%d" % sys.version_info[:2],
    "site_packages": str(Path(find_spec("pytriton").origin).parents[1]),
    "library": sysconfig.get_config_var("LIBDIR"),
    "versions": versions,
}))
"""


@dataclass(frozen=True)
class Environment:
    """An interpreter with nvidia-pytriton and one of ONNX Runtime's packages.

    python_version: such as 3.11; site_packages: where nvidia-pytriton lies; library: where its libpython lies.
    """

    python: Path
    python_version: str
    site_packages: Path
    library: Path

    @property
    def server(self) -> Path:
        """The directory of the tritonserver that pytriton brings."""
        return self.site_packages / "pytriton" / "tritonserver"

    def variables(self) -> dict[str, str]:
        """Variables of the server's process: ours, but for everything that would lead its python back to us."""
        ours = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "VIRTUAL_ENV"))}
        return ours | {
            # Copied out of its wheel, the backend no longer finds the libraries beside it.
            "LD_LIBRARY_PATH": f"{self.site_packages / 'nvidia_pytriton.libs'}:{self.library}",
            # The stub's python takes the packages of the first python3 in here.
            "PATH": f"{self.python.parent}:{os.environ.get('PATH', os.defpath)}",
        }


def find_environment(python: Path | None) -> Environment:
    """The environment of `python`, else DFMCL_TRITON_PYTHON, else .venv-triton here or beside the code; or Broken."""
    named = python or os.environ.get("DFMCL_TRITON_PYTHON")
    nearby = [root / ".venv-triton" / "bin" / "python" for root in (Path.cwd(), Path(__file__).parents[3])]
    choices = [Path(named)] if named else nearby
    # Not resolved: a virtual environment is known by the link that starts it.
    found = next((path.absolute() for path in choices if path.is_file()), None)
    if found is None:
        raise Broken(f"{choices[0]}: no Triton environment there; {INSTALL}")
    try:
        answer = subprocess.run([found, "-c", QUESTION], capture_output=True, text=True, check=True, timeout=60)
        facts = json.loads(answer.stdout)
    except (OSError, ValueError, subprocess.SubprocessError) as error:
        reason = str(getattr(error, "stderr", "") or error).strip().splitlines()[-1]
        raise Broken(f"{found}: not a Triton environment ({reason}); {INSTALL}") from None
    if int(facts["versions"]["numpy"].split(".")[0]) >= 2:
        raise Broken(f"{found}: its numpy {facts['versions']['numpy']} corrupts tensors in Triton's stub; {INSTALL}")
    return Environment(found, facts["python"], Path(facts["site_packages"]), Path(facts["library"]))


def install_backends(environment: Environment, directory: Path) -> Path:
    """Lay out Triton's python backend and ours. By copy: Triton refuses links that lead out of the directory."""
    server = environment.server
    parts = {
        server / "backends" / "python" / "libtriton_python.so": "python",
        server / "backends" / "python" / "triton_python_backend_utils.py": "python",
        server / "python_backend_stubs" / environment.python_version / "triton_python_backend_stub": "python",
        BACKEND: "onnxruntime",
    }
    for source, backend in parts.items():
        (directory / backend).mkdir(parents=True, exist_ok=True)
        try:
            shutil.copy(source, directory / backend)
        except FileNotFoundError:
            raise Broken(f"{source}: missing in the Triton environment; {INSTALL}") from None
    return directory


@contextmanager
def footprint() -> Iterator[Path]:
    """A directory for one server, whose name also begins the names of its shared memory; both go in the end.

    What servers that were killed left behind goes first.
    """
    remove_stale()
    directory = Path(tempfile.gettempdir(), f"{PREFIX}{secrets.token_hex(6)}").absolute()
    staged = SHARED_MEMORY / f"{directory.name}.new"
    with staged.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        lock.write(str(directory))
        lock.flush()
        staged.rename(staged.with_suffix(".lock"))  # held from the first moment that others see it
        try:
            directory.mkdir(mode=0o700)
            yield directory
        finally:
            _remove(directory)


def remove_stale() -> None:
    """End and remove what is left of servers that were killed: processes, directories, shared memory.

    The lock tells the living from the dead, also between containers that share /dev/shm but see no common process.
    """
    for stale in SHARED_MEMORY.glob(f"{PREFIX}*.lock"):
        try:
            with stale.open() as lock:
                if os.fstat(lock.fileno()).st_uid != os.getuid():  # another user's word for what to kill and remove
                    continue
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                directory = Path(lock.read())
                _end(stale.stem)
                _remove(directory if directory.name == stale.stem else Path(tempfile.gettempdir(), stale.stem))
        except OSError:  # its server lives
            continue


def _end(name: str) -> None:
    """Kill what still runs for a server whose directory had this name, which nobody else's arguments hold."""
    deadline = time.monotonic() + END_SECONDS
    while (left := _processes(name)) and time.monotonic() < deadline:
        for process in left:
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        time.sleep(0.02)  # the kernel takes a moment to free its ports; it is no child of ours


def _processes(name: str) -> list[int]:
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):  # it has ended, or is another user's
            if f"/{name}/".encode() in path.read_bytes():
                found.append(int(path.parent.name))
    return found


def _remove(directory: Path) -> None:
    shutil.rmtree(directory, ignore_errors=True)
    for region in SHARED_MEMORY.glob(f"{directory.name}*"):
        region.unlink(missing_ok=True)
