"""A fire drill: what the alerts say, and how soon, when robustness is really lost: `make bench-alarms`.

Long, because a drill is one course of events.

The shipped model behind a real Triton and the gateway, a real sidecar, the distribution's Prometheus and Alertmanager
with the shipped rules. Then, one after another: the served bytes are replaced by weaker ones under the same version
number, and put back; Triton is killed, and started again; the sidecar is stopped. The weaker model is the shipped one
with its weights perturbed. A round a second instead of a minute, and the rules' `for` sixty times shorter. The images
are those that the gate published with the model: no data set is needed.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import numpy_helper

from benchmarks.result import write_result
from dfmcl.common.errors import DfmclError
from dfmcl.serving.clients.gateway import GatewayClient
from dfmcl.serving.clients.triton import Client
from dfmcl.serving.gateway.config import new_key
from dfmcl.serving.triton import environment
from dfmcl.serving.triton.process import claim_ports, running
from tests import observing
from tests.processes import wait_until

ROOT = Path(__file__).parents[1]
DFMCL = str(Path(sys.executable).with_name("dfmcl"))
HASTE = 60
WATCH = """
[target]
url = "127.0.0.1:{grpc}"
model = "{model}"
[data]
name = "npz"
path = "images.npz"
[threat]
eps = "{eps}"
[probe]
crafted = "crafted"
interval_seconds = 1.0
images = 32
replay = {replay}
attacks = ["mi-fgsm-10", "di-fgsm-10"]
[query]
gateway = "http://127.0.0.1:{gateway}"
key_file = "attack.key"
clean_key_file = "benign.key"
attack = "square-20"
images = 4
[budget]
images = 1000000
duty = 1.0
[surrogates]
runs = {surrogates}
[release]
repository = "good"
trust = "{trust}"
[record]
path = "rounds.jsonl"
[listen]
port = {watch}
"""
POOL = 352  # images of the gate's; more take longer to craft
# Answers in more than 0.5 s: beside other work on two cores that is the truth, and not what the drill is about.
BUSY = "GatewayLatencyBudgetBurn"
GATEWAY = """
[listen]
port = {gateway}
notice_seconds = 0
[triton]
endpoints = ["127.0.0.1:{grpc}"]
model = "{model}"
check_seconds = 1
"""


@dataclass(frozen=True)
class Released:
    """A promoted model with its surrogates: repository, name, trust file, and the radius that its gate speaks of.

    noise: on each convolution's weight, relative, of the weaker bytes.
    """

    repository: Path
    model: str
    trust: Path
    eps: str
    noise: float


SHIPPED = Released(
    ROOT / "model_repository",
    "resnet18-cifar10",
    ROOT / "deploy" / "resnet18-cifar10" / "trust.toml",
    "8/255",
    0.9,  # little more than half of the images are right
)


@dataclass(frozen=True)
class Alarm:
    """What was said after an event, and how soon. rounds: begun in between, None where the sidecar was gone."""

    event: str
    alert: str
    said: str
    seconds: float
    rounds: float | None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.parse_args()
    rows: list[dict[str, Any]] = []
    for replay in (16, 0):
        with tempfile.TemporaryDirectory() as folder:
            for alarm in drill(Path(folder), replay=replay, whole=replay > 0):
                rows.append({"replay": replay, **vars(alarm)})
                print(rows[-1], flush=True)
    noticed = {(row["replay"], row["alert"]): row["rounds"] for row in rows if row["said"] == "firing"}
    ratios = {
        "rounds_to_integrity_alert": noticed[16, "RobustnessIntegrityMismatch"],
        "rounds_to_proven_loss_without_replay": noticed[0, "RobustnessLost"],
    }
    conditions = {
        "n": f"32 fresh images a round of {POOL} that the gate published, two transfer attacks; replay: its own images",
        "seed": 0,
        "note": f"a round a second, `for` and keep_firing_for {HASTE} times shorter than shipped; weaker: weights times"
        f" 1 + {SHIPPED.noise} N(0, 1); seconds: until Alertmanager says so, Prometheus where it is inhibited",
    }
    write_result("alarms", "Alerts from end to end", rows, ratios, conditions)


def drill(folder: Path, release: Released = SHIPPED, *, replay: int = 16, whole: bool = True) -> Iterator[Alarm]:
    """Every alarm as it comes. replay: of the gate's images a round; whole: with the deaths of Triton and sidecar."""
    shutil.copytree(release.repository, folder / "good")
    shutil.copytree(release.repository, folder / "served")
    write_images(folder, release.model)
    ports = claim_ports(grpc=0, http=0, metrics=0, gateway=0, watch=0)
    write_configs(folder, release, ports, replay)
    good = folder / "good" / release.model / "1" / "model.onnx"
    # Beforehand, as it is advised where cores are shared: a round a second leaves no time to.
    subprocess.run([DFMCL, "craft", "--config", "watch.toml"], cwd=folder, check=True)
    with ExitStack() as stack:
        triton = stack.enter_context(Restartable(folder, release.model, ports))
        stack.enter_context(command(folder, "gateway", ports["gateway"]))
        stack.enter_context(user(folder, release.model, ports["gateway"]))
        watch = stack.enter_context(command(folder, "watch", ports["watch"]))
        (folder / "rules").mkdir()
        rules = [hasty(path, folder / "rules") for path in observing.RULES]
        alertmanager = stack.enter_context(observing.start_alertmanager(folder, hasty_routes(folder)))
        targets = {
            "watch": f"127.0.0.1:{ports['watch']}",
            "gateway": f"127.0.0.1:{ports['gateway']}",
            "triton": f"127.0.0.1:{ports['metrics']}",
        }
        prometheus = stack.enter_context(
            observing.start_prometheus(folder, targets, rules=rules, alertmanager=alertmanager)
        )
        look = Look(prometheus, alertmanager, triton)
        wait_until(lambda: look.rounds() >= 5, seconds=120, pause=0.2)
        if whole:
            observing.every_panel_returns_data(prometheus, seconds=120)
        pages = look.pages() - {BUSY}
        assert not pages, f"pages although all is well: {pages}"

        begun = look.now()
        triton.swap(weaker(good, release.noise))
        if replay:
            yield look.until("weaker bytes", begun, "RobustnessIntegrityMismatch", where="pages")
        yield look.until("weaker bytes", begun, "RobustnessLost", where="firing" if replay else "pages")
        begun = look.now()
        triton.swap(good.read_bytes())
        if replay:
            yield look.until("put back", begun, "RobustnessIntegrityMismatch", where="pages", gone=True)
        yield look.until("put back", begun, "RobustnessLost", where="firing", gone=True)
        if not whole:
            return
        begun = look.now()
        triton.kill()
        # One page for one cause: the gateway's, which knows of users; the sidecar's own is inhibited by it.
        yield look.until("Triton killed", begun, "TritonModelNotReady", where="pages")
        yield look.until("Triton killed", begun, "RobustnessTargetDown", where="firing")
        yield look.until("Triton killed", begun, "RobustnessProbeStale", where="firing")
        begun = look.now()
        triton.start()
        yield look.until("Triton back", begun, "TritonModelNotReady", where="pages", gone=True)
        yield look.until("Triton back", begun, "RobustnessTargetDown", where="firing", gone=True)
        begun = look.now()
        watch.send_signal(signal.SIGTERM)
        assert watch.wait(30) == 0, "the sidecar did not stop with exit code 0"
        yield look.until("sidecar stopped", begun, "RobustnessProbeAbsent", where="firing", counted=False)


class Look:
    """What both servers say now."""

    def __init__(self, prometheus: str, alertmanager: str, triton: Restartable) -> None:
        self._prometheus, self._alertmanager, self._triton = prometheus, alertmanager, triton

    def now(self) -> tuple[float, float]:
        """Seconds and rounds."""
        return time.monotonic(), self.rounds()

    def rounds(self) -> float:
        """Rounds through Triton so far."""
        found = observing.query(self._prometheus, 'robustness_probe_rounds_total{via="triton"}')
        return found[0][1] if found else 0.0

    def pages(self) -> set[str]:
        """Critical alerts that reach a receiver: active, and not inhibited."""
        alerts = observing.fetch(f"{self._alertmanager}/api/v2/alerts?active=true&inhibited=false")
        return {alert["labels"]["alertname"] for alert in alerts if alert["labels"]["severity"] == "critical"}

    def firing(self) -> set[str]:
        """All that fire, inhibited or not."""
        return observing.firing(self._prometheus)

    def until(
        self,
        event: str,
        begun: tuple[float, float],
        alert: str,
        *,
        where: str,
        gone: bool = False,
        counted: bool = True,
    ) -> Alarm:
        """Wait until an alert is there, or gone; Crashed where Triton dies meanwhile. where: `pages` or `firing`."""

        def said() -> bool:
            self._triton.require_running()
            return (alert in getattr(self, where)()) != gone

        wait_until(said, seconds=240, pause=0.2)
        seconds, rounds = time.monotonic() - begun[0], self.rounds() - begun[1] if counted else None
        return Alarm(event, alert, "resolved" if gone else "firing", round(seconds, 1), rounds)


class Restartable:
    """A bare Triton on fixed ports, as another team might run it: it verifies nothing. A context manager."""

    def __init__(self, folder: Path, model: str, ports: dict[str, int]) -> None:
        self._folder, self._model, self._stack = folder, model, ExitStack()
        self._ports = {name: ports[name] for name in ("http", "grpc", "metrics")}

    def __enter__(self) -> Restartable:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def start(self) -> None:
        """Start it, and wait until the model answers."""
        found, repository = environment.find_environment(None), self._folder / "served"
        log = self._folder / "triton.log"
        self._killed = False
        self.server = self._stack.enter_context(
            running(found, repository, self._ports, [self._model], log, fixed=False)
        )
        wait_until(self._answers, self.server.process, seconds=60)

    def kill(self) -> None:
        """As a crash would."""
        self._killed = True
        self.server.process.kill()
        self.server.process.wait()
        self._stack.close()

    def require_running(self) -> None:
        """Crashed where it died, unless `kill` did it: its python backend does now and then, by itself."""
        if not self._killed:
            self.server.require_running()

    def swap(self, model: bytes) -> None:
        """Serve other bytes under the same version, by a restart."""
        self._stack.close()
        (self._folder / "served" / self._model / "1" / "model.onnx").write_bytes(model)
        self.start()

    def _answers(self) -> bool:
        try:
            with Client(f"127.0.0.1:{self._ports['grpc']}", self._model, timeout_seconds=2) as client:
                client.describe()
        except DfmclError:
            return False
        return True


@contextmanager
def command(folder: Path, name: str, port: int) -> Iterator[subprocess.Popen[bytes]]:
    """`dfmcl NAME --config NAME.toml`, from the moment that it answers HTTP."""
    arguments = [DFMCL, name, "--config", f"{name}.toml"]
    with (folder / f"{name}.log").open("wb") as log:
        process = subprocess.Popen(arguments, cwd=folder, stdout=log, stderr=log)
        try:
            wait_until(lambda: answers(f"http://127.0.0.1:{port}/metrics"), process, seconds=60)
            yield process
        finally:
            process.terminate()
            process.wait(30)


@contextmanager
def user(folder: Path, model: str, port: int) -> Iterator[None]:
    """A user who asks for a label now and then, whatever the answer."""
    stop, url = threading.Event(), f"http://127.0.0.1:{port}"
    with np.load(folder / "images.npz") as data:
        images, classes = data["x_test"], len(data["classes"])
    key = (folder / "user.key").read_text()

    def ask() -> None:
        with GatewayClient(url, model, classes=classes, key=key) as client:
            for number in itertools.count():
                if stop.wait(0.1):
                    return
                with suppress(DfmclError):
                    client.predict(images[number % len(images)][None])

    thread = threading.Thread(target=ask)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=2):
            return True
    except OSError:
        return False


def write_images(folder: Path, model: str) -> None:
    """Images that the gate published, as a data set."""
    version = folder / "good" / model / "1"
    with np.load(version / "probes.npz") as probes:
        images, labels = probes["images"][:POOL], probes["labels"][:POOL]
    classes = (version / "labels.txt").read_text(encoding="utf-8").splitlines()
    np.savez(
        folder / "images.npz", x_train=images[:1], y_train=labels[:1], x_test=images, y_test=labels, classes=classes
    )


def write_configs(folder: Path, release: Released, ports: dict[str, int], replay: int) -> None:
    """Of sidecar and gateway, with a key for a user and for each of the two canaries."""
    keys = []
    for name in ("user", "attack", "benign"):
        secret, _ = new_key(name)
        (folder / f"{name}.key").write_text(secret)
        digest = hashlib.sha256(secret.encode()).hexdigest()
        canary = f'canary = true\nprobe = "{name}"\nlogits = true\n' if name != "user" else ""
        keys.append(
            f'[[keys]]\nname = "{name}"\nsha256 = "{digest}"\nimages_per_second = 1000.0\nburst_images = 1000\n{canary}'
        )
    gateway = GATEWAY.format(model=release.model, **ports) + "".join(keys)
    (folder / "gateway.toml").write_text(gateway, encoding="utf-8")
    surrogates = sorted(str(path) for path in (folder / "good" / release.model / "surrogates").iterdir())
    about = {"model": release.model, "eps": release.eps, "trust": release.trust, "replay": replay}
    watch = WATCH.format(surrogates=json.dumps(surrogates), **about, **ports)
    (folder / "watch.toml").write_text(watch, encoding="utf-8")


def weaker(path: Path, noise: float) -> bytes:
    """The model with relative noise on the weights of its convolutions."""
    model, stream = onnx.load(str(path)), np.random.default_rng(0)
    for tensor in model.graph.initializer:
        weights = numpy_helper.to_array(tensor)
        if weights.ndim == 4 and weights.shape[2] > 1:
            noisy = weights * (1 + noise * stream.standard_normal(weights.shape))
            tensor.CopyFrom(numpy_helper.from_array(noisy.astype(weights.dtype), tensor.name))
    return bytes(model.SerializeToString())


def hasty(rules: Path, folder: Path) -> Path:
    """The rules with shorter `for`: they wait for scrapes and rounds, which come sooner here too."""

    def shorter(found: re.Match[str]) -> str:
        seconds = int(found[2]) * {"s": 1, "m": 60, "h": 3600}[found[3]]
        return f"{found[1]}: {max(1, round(seconds / HASTE))}s"

    text = re.sub(r"\b(for|keep_firing_for): (\d+)([smh])\b", shorter, rules.read_text(encoding="utf-8"))
    path = folder / rules.name
    path.write_text(text, encoding="utf-8")
    return path


def hasty_routes(folder: Path) -> Path:
    """The routes of Alertmanager, that wait as much less."""
    text = (ROOT / "deploy" / "prometheus" / "alertmanager.yml").read_text(encoding="utf-8")
    path = folder / "alertmanager.yml"
    path.write_text(re.sub(r"(group_wait|group_interval): \w+", r"\1: 1s", text), encoding="utf-8")
    return path


if __name__ == "__main__":
    main()
