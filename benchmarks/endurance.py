"""A sidecar over 1,000 rounds beside a real Triton: does its memory grow, do its series? `make bench-endurance`.

The shipped model under `dfmcl serve`, and `dfmcl watch` beside it, both as processes of their own. Rounds follow one
another as quickly as they can: 1,000 of them leave what 17 hours of a round a minute leave.
"""

from __future__ import annotations

import argparse
import json
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from prometheus_client.parser import text_string_to_metric_families as parse

from benchmarks.result import write_result

ROOT = Path(__file__).parents[1]
MODEL = "resnet18-cifar10"
REPOSITORY = ROOT / "model_repository"
COMMAND = str(Path(sys.executable).with_name("dfmcl"))
PATIENCE_SECONDS = 1800.0  # for a start, or for the next rows' rounds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="cifar10.npz")
    parser.add_argument("--rounds", type=int, default=1000)
    parser.add_argument("--every", type=int, default=50, help="rounds between two rows")
    parser.add_argument("--images", type=int, default=4, help="a round")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with served(folder) as grpc:
            config = written(folder, grpc, arguments)
            with started([COMMAND, "watch", "--config", str(config)], folder / "watch.log") as sidecar:
                url = announced(folder / "watch.log", sidecar)
                rows = [
                    observed(sidecar, url, rounds, folder)
                    for rounds in range(arguments.every, arguments.rounds + 1, arguments.every)
                ]
    write_result("endurance", "A sidecar over many rounds", rows, ratios(rows), conditions(arguments))


def written(folder: Path, grpc: str, arguments: argparse.Namespace) -> Path:
    """The sidecar's configuration: few images, no pause between rounds, and everything that accumulates switched on."""
    runs = json.dumps([str(path) for path in sorted((REPOSITORY / MODEL / "surrogates").iterdir())])
    path = folder / "watch.toml"
    path.write_text(
        f"""
        [target]
        url = "{grpc}"
        model = "{MODEL}"
        timeout_seconds = 60.0
        [data]
        name = "cifar10"
        path = "{arguments.data.resolve()}"
        [threat]
        eps = "8/255"
        [probe]
        interval_seconds = 0.01
        images = {arguments.images}
        replay = {arguments.images}
        attacks = ["mi-fgsm-2"]
        seed = {arguments.seed}
        [budget]
        images = 1000000
        duty = 1.0
        [abort]
        latency_factor = 1000.0
        [surrogates]
        runs = {runs}
        [release]
        repository = "{REPOSITORY}"
        trust = "{ROOT / "deploy" / MODEL / "trust.toml"}"
        [record]
        path = "{folder / "rounds.jsonl"}"
        max_bytes = 500000
        [listen]
        port = 0
        """
    )
    return path


def observed(sidecar: subprocess.Popen[bytes], url: str, rounds: int, folder: Path) -> dict[str, Any]:
    """What the sidecar holds once it has done so many rounds."""
    until(lambda: number(url, "robustness_probe_rounds_total") >= rounds, sidecar)
    text = exposition(url)
    samples = [sample for family in parse(text) for sample in family.samples if sample.name.startswith("robustness_")]
    failed = sum(sample.value for sample in samples if sample.name == "robustness_probe_round_failures_total")
    skipped = sum(sample.value for sample in samples if sample.name == "robustness_probe_rounds_skipped_total")
    row = {
        "rounds": rounds,
        "rss_mb": round(memory_kb(sidecar.pid) / 1024, 1),
        "series": len(samples),
        "threads": len(list(Path(f"/proc/{sidecar.pid}/task").iterdir())),
        "open_files": len(list(Path(f"/proc/{sidecar.pid}/fd").iterdir())),
        "exposition_kb": round(len(text) / 1024, 1),
        "record_kb": round(sum(path.stat().st_size for path in folder.glob("rounds.jsonl*")) / 1024),
        "failed": int(failed),
        "skipped": int(skipped),
    }
    print(row, flush=True)
    return row


def ratios(rows: list[dict[str, Any]]) -> dict[str, float]:
    """The last row beside the one after 100 rounds and the one halfway: what grows with rounds grows there too."""
    last = rows[-1]
    found = {}
    for rounds in (100, last["rounds"] // 2):
        earlier = next(row for row in rows if row["rounds"] >= rounds)
        for what in ("rss_mb", "series"):
            name = f"{what.removesuffix('_mb')}_at_{last['rounds']}_vs_{earlier['rounds']}"
            found[name] = last[what] / earlier[what]
    return found | {"failed_rounds": last["failed"] / last["rounds"]}


def conditions(arguments: argparse.Namespace) -> dict[str, Any]:
    return {
        "n": f"{arguments.rounds} rounds of {arguments.images} fresh and {arguments.images} replayed images",
        "seed": arguments.seed,
        "note": f"{MODEL} under `dfmcl serve`, all its surrogates, mi-fgsm-2 at 8/255; rss_mb: of the sidecar's process"
        " as /proc has it; series: of robustness_*; the record is bounded to 2 x 500 kB. Adversarial images are kept,"
        " up to one for each of the 10,000 test images: 4 kB for each that is drawn for the first time",
    }


@contextmanager
def served(folder: Path) -> Iterator[str]:
    """`dfmcl serve` on free ports, on a copy of what is shipped; yields the gRPC address."""
    shutil.copytree(REPOSITORY, folder / "models", ignore=shutil.ignore_patterns("surrogates"))
    ready = folder / "ready.json"
    ports = ["--http-port", "0", "--grpc-port", "0", "--metrics-port", "0"]
    command = [COMMAND, "serve", "--repository", str(folder / "models"), *ports, "--ready-file", str(ready)]
    with started(command, folder / "serve.log") as server:
        until(ready.exists, server)
        yield json.loads(ready.read_text())["grpc"]


@contextmanager
def started(command: list[str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A process for the length of a block, which must end well."""
    with log.open("wb") as said:
        process = subprocess.Popen(command, cwd=ROOT, stdout=said, stderr=said)
    try:
        yield process
    except BaseException:
        print(log.read_text()[-2000:], file=sys.stderr)
        raise
    finally:
        process.send_signal(signal.SIGTERM)
        code = process.wait(60)
    if code:
        raise SystemExit(f"{command[1]} ended with {code}: {log.read_text()[-2000:]}")


def announced(log: Path, sidecar: subprocess.Popen[bytes]) -> str:
    """Where the sidecar says that its metrics are."""
    until(lambda: "metrics at " in log.read_text(), sidecar)
    return log.read_text().partition("metrics at ")[2].split()[0]


def until(condition: Callable[[], bool], process: subprocess.Popen[bytes]) -> None:
    """Wait for what another process does."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not condition():
        if process.poll() is not None or time.monotonic() > deadline:
            raise RuntimeError(f"{process.args!r} ended with {process.returncode}, or took too long")
        time.sleep(0.05)  # another process writes the file that is looked at


def exposition(url: str) -> str:
    with urllib.request.urlopen(url, timeout=60) as response:
        return str(response.read().decode())


def number(url: str, name: str) -> float:
    """The sum of a metric's samples."""
    return sum(sample.value for family in parse(exposition(url)) for sample in family.samples if sample.name == name)


def memory_kb(process: int) -> int:
    """Resident memory."""
    status = Path(f"/proc/{process}/status").read_text()
    return int(status.partition("VmRSS:")[2].split()[0])


if __name__ == "__main__":
    main()
