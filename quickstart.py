"""The whole line on scanned digits: train, evaluate, export, gate, promote, serve, watch. `make quickstart` runs it.

Every stage is a `dfmcl` command, printed before it runs, so that it can be run again by hand. Writes `.quickstart/`.
"""

from __future__ import annotations

import argparse
import json
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from prometheus_client.parser import text_string_to_metric_families
from rich.console import Console
from rich.table import Table

HOME = Path(".quickstart")
DFMCL = Path(sys.executable).with_name("dfmcl")
POLICY = Path("deploy/quickstart/gate.toml")
MODEL = "digits"
EPS = "38/255"
L2_EPS = "1.5"
MODELS = {"hardened": "quickstart", "standard": "quickstart_standard"}
START_SECONDS = 180.0
WATCH = """\
# Written by quickstart.py: what the sidecar attacks, with what, and how often.
[target]
url = "{grpc}"
model = "{model}"

[data]
name = "digits"

[threat]
norm = "linf"
eps = "{eps}"

[probe]
interval_seconds = 30
images = 150
attacks = ["mi-fgsm-10", "pgd-10"]

[surrogates]
runs = ["surrogate"]

[release]
evidence = "hardened-evidence"

[listen]
port = {port}
"""

console = Console(highlight=False)


class StageFailed(Exception):
    """A stage did not end as it must."""


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Run the whole line on scanned digits.")
    parser.add_argument("--exit", action="store_true", help="stop at the end instead of serving until Ctrl-C")
    arguments = parser.parse_args(argv)
    started = time.monotonic()
    servers: list[subprocess.Popen[bytes]] = []
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # unwinds: no server stays behind
    try:
        prepare()
        codes = make_models()
        promote()
        urls = serve(servers)
        metrics_url = watch(servers, urls["grpc"])
        live = scrape(metrics_url)
        console.print(accuracy_table())
        for name in MODELS:
            console.print(f"gate, {name}: {verdict(name)} (exit code {codes[name]})")
        console.print(live_line(live), soft_wrap=True)
        console.print(f"model:   {urls['http']}/v2/models/{MODEL}   gRPC {urls['grpc']}")
        console.print(f"metrics: {metrics_url}")
        seconds = time.monotonic() - started
        if not arguments.exit:
            console.print(f"all stages held, {seconds:.0f} s; serving until Ctrl-C")
            wait(servers)
        if any(stop(servers)):
            raise StageFailed("a server did not stop with exit code 0; see above")
        console.print(f"all stages held, {seconds:.0f} s")
        return 0
    except StageFailed as failure:
        console.print(f"quickstart: {failure}", style="bold red")
        return 1
    except KeyboardInterrupt:
        console.print("stopped before the end")
        return 130
    finally:
        stop(servers)


def prepare() -> None:
    """Start from nothing, so that what is printed is what this run did."""
    if HOME.is_dir():
        shutil.rmtree(HOME)
    HOME.mkdir()


def make_models() -> dict[str, int]:
    """Train, evaluate, export and gate both models; the surrogate is trained only. Returns the gate's exit codes."""
    for name, preset in {**MODELS, "surrogate": "quickstart_surrogate"}.items():
        dfmcl("train", preset, "--out", str(HOME / name))
    codes = {}
    for name, expected in (("hardened", 0), ("standard", 1)):
        run, candidate = str(HOME / name), str(HOME / f"{name}-candidate")
        options = ["--threat", EPS, "--threat", f"l2:{L2_EPS}", "--surrogate", str(HOME / "surrogate")]
        dfmcl("evaluate", run, *options, "--out", str(HOME / f"{name}.json"))
        dfmcl("export", run, "--out", candidate)
        evidence = str(HOME / f"{name}-evidence")
        options = ["--run", run, "--policy", str(POLICY), "--out", evidence]
        codes[name] = dfmcl("gate", candidate, *options, expected=expected)
    return codes


def promote() -> None:
    """What passed goes into the repository; what was blocked is refused."""
    for name, expected in (("standard", 1), ("hardened", 0)):
        options = ["--evidence", str(HOME / f"{name}-evidence"), "--repository", str(HOME / "repository")]
        dfmcl("promote", str(HOME / f"{name}-candidate"), *options, "--name", MODEL, expected=expected)


def serve(servers: list[subprocess.Popen[bytes]]) -> dict[str, str]:
    """Triton on free ports; returns its URLs once it answers."""
    ready = HOME / "ready.json"
    ports = ["--http-port", "0", "--grpc-port", "0", "--metrics-port", "0"]
    server = spawn("serve", "--repository", str(HOME / "repository"), *ports, "--ready-file", str(ready))
    servers.append(server)
    with console.status("waiting for Triton to answer"):
        wait_for(ready.exists, server, "Triton")
    urls: dict[str, str] = json.loads(ready.read_text(encoding="utf-8"))
    return urls


def watch(servers: list[subprocess.Popen[bytes]], grpc: str) -> str:
    """The sidecar; returns the URL of its metrics once its first round is in them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    config = HOME / "watch.toml"
    config.write_text(WATCH.format(grpc=grpc, model=MODEL, eps=EPS, port=port), encoding="utf-8")
    sidecar = spawn("watch", "--config", str(config))
    servers.append(sidecar)
    url = f"http://127.0.0.1:{port}/metrics"
    with console.status("waiting for the sidecar's first round"):
        wait_for(lambda: has_round(url), sidecar, "the sidecar's first round")
    return url


def has_round(url: str) -> bool:
    """Whether a round has succeeded."""
    try:
        return any(sample.value > 0 for sample in scrape(url)["robustness_probe_last_success_timestamp_seconds"])
    except (OSError, KeyError):
        return False


def scrape(url: str) -> dict[str, list[Any]]:
    """All samples of a metrics page, by name."""
    with urllib.request.urlopen(url, timeout=10) as response:
        families = text_string_to_metric_families(response.read().decode())
        samples: dict[str, list[Any]] = {}
        for sample in (sample for family in families for sample in family.samples):
            samples.setdefault(sample.name, []).append(sample)
        return samples


def accuracy_table() -> Table:
    """Clean, FGSM, PGD-20, C&W and transfer accuracy of both models with exact 95 % intervals, from their records."""
    columns = {}
    for name in MODELS:
        record = json.loads((HOME / f"{name}.json").read_text(encoding="utf-8"))
        linf, l2, transfer = record["evaluations"]
        white = {attack["name"]: attack["accuracy"] for attack in linf["attacks"]}
        columns[name] = {
            "clean": linf["clean"],
            f"FGSM, Linf {EPS}": white["fgsm"],
            f"PGD-20, Linf {EPS}": white["pgd-20"],
            f"C&W, L2 {L2_EPS}": l2["robust"],
            f"transfer, Linf {EPS}": transfer["robust"],
        }
        images = linf["images"]
    table = Table("", *MODELS, title=f"accuracy on {images} test images, % [95 % interval]", title_justify="left")
    for row in columns["hardened"]:
        table.add_row(row, *(share(column[row]) for column in columns.values()))
    return table


def share(value: dict[str, float]) -> str:
    low, high = value["lower_95"], value["upper_95"]
    return f"{100 * value['value']:.1f} \\[{100 * low:.1f}, {100 * high:.1f}]"


def verdict(name: str) -> str:
    report = json.loads((HOME / f"{name}-evidence" / "report.json").read_text(encoding="utf-8"))
    return {"passed": "[green]passed[/], promoted and served", "failed": "[red]blocked[/]"}[report["verdict"]]


def live_line(live: dict[str, list[Any]]) -> str:
    """What the sidecar found through the network."""
    found = [
        f"{sample.labels['attack']} {100 * sample.value:.1f} %" for sample in live["robustness_robust_accuracy_ratio"]
    ]
    return f"live, crafted on the surrogate and sent through gRPC: still right under {', '.join(sorted(found))}"


def dfmcl(*arguments: str, expected: int = 0) -> int:
    """Run one command in the foreground; anything but the expected exit code ends the quickstart."""
    console.print(f"\n$ dfmcl {' '.join(arguments)}", style="bold", soft_wrap=True)
    code = subprocess.run([DFMCL, *arguments], check=False).returncode
    if code != expected:
        raise StageFailed(f"dfmcl {arguments[0]} ended with exit code {code}, expected {expected}; see above")
    return code


def spawn(*arguments: str) -> subprocess.Popen[bytes]:
    """Start one command in the background."""
    console.print(f"\n$ dfmcl {' '.join(arguments)} &", style="bold", soft_wrap=True)
    return subprocess.Popen([DFMCL, *arguments], start_new_session=True)  # Ctrl-C comes to us, then to them in order


def wait_for(condition: Any, process: subprocess.Popen[bytes], what: str) -> None:
    deadline = time.monotonic() + START_SECONDS
    while not condition():
        if process.poll() is not None:
            raise StageFailed(f"{what}: the process ended with exit code {process.returncode}; see above")
        if time.monotonic() > deadline:
            raise StageFailed(f"{what}: not there after {START_SECONDS:.0f} s")
        time.sleep(0.2)


def wait(servers: list[subprocess.Popen[bytes]]) -> None:
    """Until Ctrl-C; a server that dies before is a failure."""
    try:
        while all(server.poll() is None for server in servers):
            time.sleep(1)
    except KeyboardInterrupt:
        console.print("stopping")
        return
    raise StageFailed("a server ended by itself; see above")


def stop(servers: list[subprocess.Popen[bytes]]) -> list[int]:
    """The sidecar first, then Triton; each gets time to drain. Returns their exit codes."""
    for server in reversed(servers):
        if server.poll() is None:
            server.send_signal(signal.SIGTERM)
            try:
                server.wait(timeout=40)
            except subprocess.TimeoutExpired:
                server.kill()
                server.wait()
    return [server.wait() for server in servers]


if __name__ == "__main__":
    raise SystemExit(main())
