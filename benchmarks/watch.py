"""What the sidecar costs users: latency and throughput at saturation with and without it: `make bench-watch`.

A full-width ResNet-18 (random weights: its answers do not matter here) behind a real Triton, sixteen clients that
each ask again as soon as they are answered, and a real `dfmcl watch` with its default budget, which is halted in every
other stretch, so that it costs nothing there. Twice: the sidecar on a core of its own, and all on the same cores. With
--crafted, on the same cores, after `dfmcl craft`.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.progress import track

from benchmarks.result import write_result
from benchmarks.serving import CLIENTS, NAME, Seconds, candidate, concurrent_triton, served, triton_version, write_run
from dfmcl.monitoring.config import BudgetSection, Probe
from dfmcl.robustness.data import Bytes, Labels, load_dataset
from dfmcl.robustness.models import ModelSpec
from dfmcl.serving.triton.process import HOST, claim_ports
from tests.processes import wait_until

POOL = 10_000  # as many as CIFAR-10 has; most images of every round are new to the crafter
CRAFTED = 500  # how many does not matter to rounds that craft nothing
SURROGATE_WIDTHS = (16, 24)
WATCH = """
[target]
url = "127.0.0.1:{grpc}"
model = "{model}"
timeout_seconds = 60.0
[data]
name = "npz"
path = "pool.npz"
[threat]
eps = "8/255"
[probe]
crafted = "{crafted}"
pause_file = "pause"
[surrogates]
runs = ["surrogate16", "surrogate24"]
[release]
evidence = "evidence"
[listen]
port = {port}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=4, help="of a stretch with and one without probes")
    parser.add_argument("--seconds", type=float, default=60, help="of a stretch; a round is due every minute")
    parser.add_argument("--crafted", action="store_true", help="all adversarial images are crafted before")
    arguments = parser.parse_args()
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < 2:
        raise SystemExit("two cores are needed: one for the sidecar")
    layouts = {"the same cores": (cores, cores)}
    if not arguments.crafted:
        layouts = {"a core of its own": (cores[:-1], cores[-1:]), **layouts}
    rows: list[dict[str, Any]] = []
    ratios: dict[str, float] = {}
    counted: list[str] = []
    for name, (server, sidecar) in layouts.items():
        without, with_probes, rounds, memory = measured(
            server, sidecar, arguments.crafted, arguments.pairs, arguments.seconds
        )
        rows += [{"sidecar on": name, **row} for row in (without, with_probes)]
        suffix = "" if len(layouts) == 1 or name != "the same cores" else "_sharing_cores"
        for figure, key in (("p99", "p99_ms"), ("p50", "p50_ms"), ("throughput", "images_per_s")):
            ratios[f"user_{figure}_with_probes_vs_without{suffix}"] = with_probes[key] / without[key]
        ratios[f"sidecar_share_of_a_core{suffix}"] = with_probes["sidecar_cores"]
        ratios["sidecar_memory_mib"] = max(memory, ratios.get("sidecar_memory_mib", 0.0))
        counted.append(f"{rounds} rounds on {name}")
    probe, budget = Probe(), BudgetSection()
    conditions = {
        "n": f"{arguments.pairs} stretches of {arguments.seconds:g} s each way, in them {' and '.join(counted)}",
        "seed": 0,
        "note": f"defaults: {probe.images} fresh, {probe.replay} replayed images a round, {' and '.join(probe.attacks)}"
        f" on two surrogates of width 16 and 24, a round every {probe.interval_seconds:g} s, duty {budget.duty:g};"
        f" {CLIENTS} clients with one image a request; Triton {triton_version()} and a ResNet-18 of width 64, with the"
        f" clients on all {len(cores)} cores or all but the sidecar's; percentiles over all requests of all stretches;"
        f" memory: the most that was resident; "
        + (f"{CRAFTED} images, all crafted before" if arguments.crafted else f"a pool of {POOL} images"),
    }
    record = "watch_crafted" if arguments.crafted else "watch"
    write_result(record, "What the sidecar costs users", rows, ratios, conditions)


def measured(
    server_cores: list[int], sidecar_cores: list[int], crafted: bool, pairs: int, seconds: float
) -> tuple[dict[str, Any], dict[str, Any], int, float]:
    """Rows without and with probes, rounds that were measured, and the sidecar's memory in MiB."""
    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        folder = Path(name)
        stack.callback(os.sched_setaffinity, 0, os.sched_getaffinity(0))
        os.sched_setaffinity(0, server_cores)  # whatever is started from here inherits it: Triton, clients
        candidate(folder, 64)
        server = stack.enter_context(served(folder))
        with server.client(NAME) as client:
            write_sidecar(
                folder, CRAFTED if crafted else POOL, lambda images: client.predict(images).logits.argmax(axis=1)
            )
        port = claim_ports(watch=0)["watch"]
        config = WATCH.format(model=NAME, grpc=server.ports["grpc"], port=port, crafted="crafted" if crafted else "")
        (folder / "watch.toml").write_text(config, encoding="utf-8")
        log = stack.enter_context((folder / "watch.log").open("wb"))
        dfmcl = str(Path(sys.executable).with_name("dfmcl"))
        if crafted:
            subprocess.run([dfmcl, "craft", "--config", "watch.toml"], cwd=folder, check=True)
        command = [dfmcl, "watch", "--config", "watch.toml"]
        # A session of its own, as a service manager gives it: Linux shares cores among sessions first (autogroups, see
        # sched(7)), so that its niceness counts for nothing. In ours it would make way for the clients, not for Triton.
        sidecar = subprocess.Popen(
            ["taskset", "--cpu-list", ",".join(map(str, sidecar_cores)), *command],
            cwd=folder, stdout=log, stderr=log, start_new_session=True,
        )  # fmt: skip
        stack.callback(sidecar.terminate)
        stack.callback(sidecar.send_signal, signal.SIGCONT)  # before: who is halted does not see that it shall end
        wait_until(lambda: b"watching" in (folder / "watch.log").read_bytes(), sidecar)
        asked = f"{HOST}:{server.ports['grpc']}"
        pictures = np.random.default_rng(1).integers(0, 256, (CLIENTS, 32, 32, 3), dtype=np.uint8)
        asyncio.run(concurrent_triton(asked, pictures, 10))
        found: dict[str, list[tuple[int, Seconds, float]]] = {"without": [], "with": []}
        cpu: dict[str, list[float]] = {"without": [], "with": []}
        for number in track(range(2 * pairs), "stretches, without and with probes"):
            case = ("without", "with")[(number + number // 2) % 2]  # 0 1 1 0: a drift of the machine cancels
            halt(sidecar, folder / "pause") if case == "without" else resume(sidecar, folder / "pause")
            before, begun = cpu_seconds(sidecar.pid), time.perf_counter()
            found[case].append(asyncio.run(concurrent_triton(asked, pictures, seconds)))
            cpu[case].append((cpu_seconds(sidecar.pid) - before) / (time.perf_counter() - begun))
        memory = memory_mib(sidecar.pid)
        said = (folder / "watch.log").read_text()
        if not (rounds := said.count("by triton: model")):
            raise SystemExit(f"no round was measured, so there is nothing to compare; the sidecar said:\n{said}")
    without, with_probes = (described(case, found[case], cpu[case]) for case in found)
    return without, with_probes, rounds, memory


def halt(sidecar: subprocess.Popen[bytes], pause: Path) -> None:
    """No more rounds, then nothing at all: crafting would go on without."""
    pause.touch()
    time.sleep(5)  # a round that has begun ends
    sidecar.send_signal(signal.SIGSTOP)


def resume(sidecar: subprocess.Popen[bytes], pause: Path) -> None:
    sidecar.send_signal(signal.SIGCONT)
    pause.unlink(missing_ok=True)


def write_sidecar(folder: Path, pool: int, labelled: Callable[[Bytes], Labels]) -> None:
    """A pool of random images and two surrogates of random weights. labelled: as the served model answers, so that
    every image is right and is asked about under each attack: a round costs all that it can."""
    images = np.random.default_rng(2).integers(0, 256, (pool, 32, 32, 3), np.uint8)
    labels = np.concatenate([labelled(images[begin : begin + 50]) for begin in range(0, pool, 50)])
    np.savez(folder / "pool.npz", x_train=images[:10], y_train=np.arange(10), x_test=images, y_test=labels)
    data = load_dataset("npz", str(folder / "pool.npz"))
    for width in SURROGATE_WIDTHS:
        run = folder / f"surrogate{width}"
        run.mkdir()
        torch.manual_seed(width)
        spec = ModelSpec("resnet18", width, 10, (32, 32, 3), (0.5, 0.5, 0.5), (0.25, 0.25, 0.25))
        write_run(run, spec, data)


def described(case: str, stretches: list[tuple[int, Seconds, float]], cpu: list[float]) -> dict[str, Any]:
    taken = 1000 * np.concatenate([seconds for _, seconds, _ in stretches])
    p50, p95, p99 = np.percentile(taken, [50, 95, 99])
    rate = float(np.median([count * len(seconds) / total for count, seconds, total in stretches]))
    return {
        "probes": case,
        "images_per_s": rate,
        "p50_ms": p50,
        "p95_ms": p95,
        "p99_ms": p99,
        "requests": len(taken),
        "sidecar_cores": float(np.mean(cpu)),
    }


def cpu_seconds(pid: int) -> float:
    """What a process has computed so far, all its threads together."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")  # utime, stime: proc(5)


def memory_mib(pid: int) -> float:
    """The most that was resident."""
    (line,) = (line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) / 1024


if __name__ == "__main__":
    main()
