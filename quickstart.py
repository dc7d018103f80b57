"""The whole line on scanned digits: train, evaluate, export, gate, promote, serve, watch. `make quickstart` runs it.

Long, because it is read from top to bottom.

With `--model shipped` the end of the line on the model that lies in model_repository/: verify, serve, watch; nothing is
trained. Every stage is a `dfmcl` command, printed before it runs, so that it can be run again by hand. What the gate
finds is signed with a key that is made here and that nothing else trusts.
Writes `.quickstart/` and nothing else.
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
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from prometheus_client.parser import text_string_to_metric_families
from rich.console import Console
from rich.progress import track
from rich.table import Table

from dfmcl.common.errors import DfmclError
from dfmcl.gating.signing.evaluation import ShareEntry, SuiteEntry
from dfmcl.gating.signing.evidence import read_report
from dfmcl.gating.signing.probes_file import read_probes
from dfmcl.gating.signing.trust import load_trust
from dfmcl.release import layout
from dfmcl.release.stores.directory import Directory
from dfmcl.release.verification import Promoted, verify_release
from dfmcl.robustness.statistics import Share
from dfmcl.serving.clients.triton import Client
from dfmcl.serving.ready import read_ready

HOME = Path(".quickstart")
DFMCL = Path(sys.executable).with_name("dfmcl")
POLICY = Path("deploy/quickstart/gate.toml")
TRUST = Path("deploy/resnet18-cifar10/trust.toml")  # of the shipped model
KEY = "release"
TRUST_FILE = """\
# Written by quickstart.py: promotion lets in what this key signed, by this policy.
threshold = 1
drawn = true # that key drew the order of the images, too
keys = ["{key}.pub"]
policies = [{policy}]
"""
MODEL = "digits"
EPS = "38/255"
L2_EPS = "1.5"
OTHER_THREATS = ("patch:3x3", "rotation:15", "fog@3")
MODELS = {"hardened": "quickstart", "standard": "quickstart_standard"}
START_SECONDS = 180.0
REPOSITORY = Path("model_repository")
ASKED_AT_ONCE = 64  # images: Triton takes no more in a request
PROBE_IMAGES = 100  # a round of the shipped model; three narrow surrogates craft them in under a minute on two cores
EXAMPLES = 6
CAPTION = (
    "<= live under an attack crafted on the surrogates: an upper bound of robust accuracy; the live bounds are of the"
    " mean over the rounds so far, and hold however often one looks"
)
# Metrics of the sidecar: a share, the bounds of its mean.
CLEAN = (
    "robustness_clean_accuracy_ratio",
    "robustness_clean_accuracy_mean_lower_ratio",
    "robustness_clean_accuracy_mean_upper_ratio",
)
ROBUST = (
    "robustness_robust_accuracy_ratio",
    "robustness_robust_accuracy_mean_lower_ratio",
    "robustness_robust_accuracy_mean_upper_ratio",
)
MIN_AGREEMENT = 0.99  # of labels with those the gate recorded: its adversarial images lie at the border, as in the gate
WATCH = """\
# Written by quickstart.py: what the sidecar attacks, with what, and how often.
[target]
url = "{grpc}"
model = "{model}"

[data]
name = "{data}"
path = "{path}"

[threat]
norm = "{norm}"
eps = "{eps}"

[probe]
interval_seconds = {interval}
images = {images}
attacks = ["mi-fgsm-10", "di-fgsm-10"]

[budget]
images = 100000
duty = 0.5

[surrogates]
runs = {runs}

[release]
repository = "{repository}"
trust = "{trust}"

[listen]
port = {port}
"""

console = Console(highlight=False)


class StageFailed(Exception):
    """A stage did not end as it must."""


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Run the whole line on scanned digits, or its end on a shipped model.")
    parser.add_argument("--exit", action="store_true", help="stop at the end instead of serving until Ctrl-C")
    parser.add_argument("--model", choices=["digits", "shipped"], default="digits")
    parser.add_argument("--repository", type=Path, default=REPOSITORY, help="where the shipped model lies")
    parser.add_argument("--trust", type=Path, default=TRUST, help="whose signature counts for the shipped model")
    arguments = parser.parse_args(argv)
    started = time.monotonic()
    servers: list[subprocess.Popen[bytes]] = []
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # unwinds: no server stays behind
    try:
        prepare()
        if arguments.model == "shipped":
            shipped_line(servers, arguments.repository, arguments.trust)
        else:
            digits_line(servers)
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


def digits_line(servers: list[subprocess.Popen[bytes]]) -> None:
    """From training to watching, on digits; prints what was measured on the way."""
    make_key()
    codes = make_models()
    promote()
    dfmcl("verify", str(HOME / "repository" / MODEL), "--trust", str(HOME / "trust.toml"))
    urls = serve(servers, HOME / "repository")
    metrics_url = watch(
        servers,
        grpc=urls["grpc"],
        model=MODEL,
        data="digits",
        path="",
        norm="linf",
        eps=EPS,
        interval=30,
        images=150,
        runs=json.dumps(["surrogate"]),
        repository="repository",
        trust="trust.toml",
    )
    live = scrape(metrics_url)
    console.print(accuracy_table())
    for name in MODELS:
        console.print(f"gate, {name}: {verdict(name)} (exit code {codes[name]})")
    console.print(live_line(live), soft_wrap=True)
    print_urls(urls, MODEL, metrics_url)


def shipped_line(servers: list[subprocess.Popen[bytes]], repository: Path, trust: Path) -> None:
    """Verify, serve and watch the one model of a repository; prints the gate's figures beside the live ones."""
    release = verify(repository, trust)
    evaluation = read_report(release.path / layout.REPORT)[0].evaluation
    surrogates = sorted(
        path.parent for path in (repository / release.model / layout.SURROGATES).glob("*/manifest.json")
    )
    if not surrogates:
        raise StageFailed(
            f"{repository / release.model}: no surrogates to attack it with; `dfmcl pack` puts them there"
        )
    probes = read_probes(release.path / layout.PROBES)
    urls = serve(servers, repository)
    metrics_url = watch(
        servers,
        grpc=urls["grpc"],
        model=release.model,
        data="npz",
        path=write_images(probes, release).absolute(),
        norm=evaluation.threat.norm,
        eps=evaluation.threat.label,
        interval=60,
        images=min(PROBE_IMAGES, len(probes["images"])),
        runs=json.dumps([str(path.absolute()) for path in surrogates]),
        repository=repository.absolute(),
        trust=trust.absolute(),
    )
    with Client(urls["grpc"], release.model) as client:
        labels = client.describe().labels
        clean = answers(client, probes["images"], "asking for the gate's images")
        adversarial = answers(client, probes["adversarial"], "asking for its adversarial ones")
    require_as_gated(clean, probes["clean_logits"], "images")
    require_as_gated(adversarial, probes["adversarial_logits"], "adversarial images")
    right = clean == probes["labels"]
    replayed = {
        "clean": Share(int(right.sum()), len(right)),
        "robust": Share(int((right & (adversarial == probes["labels"])).sum()), len(right)),
    }
    console.print(example_table(labels, probes["labels"], clean, adversarial))
    console.print(release_table(release, evaluation, replayed, scrape(metrics_url)))
    print_urls(urls, release.model, metrics_url)


def prepare() -> None:
    """Start from nothing, so that all printed figures are of this run."""
    if HOME.is_dir():
        shutil.rmtree(HOME)
    HOME.mkdir()


def make_key() -> None:
    """A key of this run's own, and the trust file that names it and the policy."""
    dfmcl("keygen", str(HOME / KEY))
    trust = TRUST_FILE.format(key=KEY, policy=json.dumps(str(POLICY.absolute())))
    (HOME / "trust.toml").write_text(trust, encoding="utf-8")


def make_models() -> dict[str, int]:
    """Train, evaluate, export, gate and sign both models, train the surrogate; returns the gate's exit codes."""
    for name, preset in {**MODELS, "surrogate": "quickstart_surrogate"}.items():
        dfmcl("train", preset, "--out", str(HOME / name))
    codes = {}
    for name, expected in (("hardened", 0), ("standard", 1)):
        run, candidate = str(HOME / name), str(HOME / f"{name}-candidate")
        options = ["--threat", EPS, "--threat", f"l2:{L2_EPS}", "--surrogate", str(HOME / "surrogate")]
        dfmcl("evaluate", run, *options, "--out", str(HOME / f"{name}.json"))
        others = [text for threat in OTHER_THREATS for text in ("--threat", threat)]
        dfmcl("evaluate", run, *others, "--images", "100", "--out", str(HOME / f"{name}-threats.json"))
        dfmcl("export", run, "--out", candidate)
        evidence = str(HOME / f"{name}-evidence")
        options = ["--run", run, "--policy", str(POLICY), "--key", str(HOME / f"{KEY}.key"), "--out", evidence]
        codes[name] = dfmcl("gate", candidate, *options, expected=expected)
    return codes


def promote() -> None:
    """What passed goes into the repository; what was blocked is refused."""
    for name, expected in (("standard", 1), ("hardened", 0)):
        options = ["--evidence", str(HOME / f"{name}-evidence"), "--repository", str(HOME / "repository")]
        options += ["--name", MODEL, "--trust", str(HOME / "trust.toml")]
        dfmcl("promote", str(HOME / f"{name}-candidate"), *options, expected=expected)


def verify(repository: Path, trust: Path) -> Promoted:
    """The one release of a repository, if signature, digests, verdict and card hold; as `dfmcl verify` judges it."""
    names = layout.model_names(Directory(repository))
    if len(names) != 1:
        raise StageFailed(f"{repository}: holds {len(names)} promoted models, expected one")
    try:
        console.print(f"\n$ dfmcl verify {repository / names[0]} --trust {trust}", style="bold", soft_wrap=True)
        release = verify_release(Directory(repository), names[0], load_trust(trust))
    except DfmclError as error:
        raise StageFailed(str(error)) from None
    card = repository / release.model / layout.CARD
    if not card.is_file() or release.sha256 not in card.read_text(encoding="utf-8"):
        raise StageFailed(f"{card}: is not about the version that is served; `dfmcl card` writes it")
    console.print(
        f"verified: {release.path} is what passed the gate; model.onnx SHA-256 {release.sha256}", soft_wrap=True
    )
    return release


def write_images(probes: dict[str, Any], release: Promoted) -> Path:
    """The release's probe images as a data set for the sidecar, which reads the test part only; returns its path."""
    images, labels = probes["images"], probes["labels"]
    classes = (release.path / "labels.txt").read_text(encoding="utf-8").splitlines()
    path = HOME / "release-probes.npz"
    np.savez(path, x_train=images[:1], y_train=labels[:1], x_test=images, y_test=labels, classes=classes)
    return path


def answers(client: Client, images: Any, title: str) -> Any:
    """The server's labels (N,) for images (N, H, W, C), with progress: a thousand take seconds on a CPU."""
    parts = np.array_split(images, -(-len(images) // ASKED_AT_ONCE))
    return np.concatenate(
        [client.predict(part).logits.argmax(axis=1) for part in track(parts, description=title, console=console)]
    )


def require_as_gated(found: Any, logits: Any, what: str) -> None:
    """End the quickstart where the server's labels (N,) are not those of the logits (N, K) that the gate recorded."""
    agreement = float((found == logits.argmax(axis=1)).mean())
    if agreement < MIN_AGREEMENT:
        raise StageFailed(f"the server labels {100 * agreement:.1f} % of the gate's {what} as the gate recorded")


def serve(servers: list[subprocess.Popen[bytes]], repository: Path) -> dict[str, str]:
    """Triton on free ports; returns its URLs once it answers."""
    ready = HOME / "ready.json"
    ports = ["--http-port", "0", "--grpc-port", "0", "--metrics-port", "0"]
    server = spawn("serve", "--repository", str(repository), *ports, "--ready-file", str(ready))
    servers.append(server)
    with console.status("waiting for Triton to answer"):
        wait_for(lambda: read_ready(ready), server, "Triton")  # not that of a run that was killed
    urls: dict[str, str] = json.loads(ready.read_text(encoding="utf-8"))
    return urls


def watch(servers: list[subprocess.Popen[bytes]], **values: Any) -> str:
    """The sidecar, told the values of WATCH; returns the URL of its metrics once its first round is in them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    config = HOME / "watch.toml"
    config.write_text(WATCH.format(port=port, **values), encoding="utf-8")
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
        linf, l2, transfer = (SuiteEntry.from_json(entry) for entry in record["evaluations"])
        white = {attack.name: attack.accuracy for attack in linf.attacks}
        columns[name] = {
            "clean": linf.clean,
            f"FGSM, Linf {EPS}": white["fgsm"],
            f"PGD-20, Linf {EPS}": white["pgd-20"],
            f"C&W, L2 {L2_EPS}": l2.robust,
            f"transfer, Linf {EPS}": transfer.robust,
        }
        images = linf.images
    table = Table("", *MODELS, title=f"accuracy on {images} test images, % [95 % interval]", title_justify="left")
    for row in columns["hardened"]:
        table.add_row(row, *(exact(column[row]) for column in columns.values()))
    return table


def release_table(
    release: Promoted, evaluation: SuiteEntry, replayed: dict[str, Share], live: dict[str, list[Any]]
) -> Table:
    """The gate's measurements, its images' answers through the server, and the sidecar's findings; 95 % intervals."""
    threat = f"{evaluation.threat.norm} {evaluation.threat.label}"
    title = f"{release.model} version {release.version}, {threat}, % [95 % interval]"
    (images,) = {int(sample.value) for sample in live["robustness_clean_samples_total"]}
    columns = ("gate", "its images, served", f"live, {images} of them")
    table = Table("", *columns, title=title, title_justify="left", caption=CAPTION, caption_justify="left")
    (clean,) = bounds(live, CLEAN).values()
    table.add_row("clean", exact(evaluation.clean), interval(replayed["clean"]), clean)
    table.add_row("robust", exact(evaluation.robust), interval(replayed["robust"]), "")
    for attack, found in sorted(bounds(live, ROBUST).items()):
        table.add_row(f"<= {attack}", "", "", found)
    return table


def bounds(live: dict[str, list[Any]], names: Sequence[str]) -> dict[str, str]:
    """A metric of shares with the bounds of its mean, by attack (None where it has no attack)."""
    value, lower, upper = ({sample.labels.get("attack"): sample.value for sample in live[name]} for name in names)
    return {key: share(value[key], lower[key], upper[key]) for key in value}


def example_table(labels: Sequence[str], truth: Any, clean: Any, adversarial: Any) -> Table:
    """The first images of the release: their classes, and the server's answers."""
    title = "the release's first images, asked over gRPC"
    table = Table("truth", "answer", "answer to the gate's adversarial image", title=title, title_justify="left")
    for row in zip(truth[:EXAMPLES], clean, adversarial, strict=False):
        table.add_row(*(labels[int(k)] for k in row))
    return table


def print_urls(urls: dict[str, str], model: str, metrics_url: str) -> None:
    console.print(f"model:   {urls['http']}/v2/models/{model}   gRPC {urls['grpc']}", soft_wrap=True)
    console.print(f"metrics: {metrics_url}")


def interval(value: Share) -> str:
    return share(value.value, *value.bounds)


def exact(entry: ShareEntry) -> str:
    return share(entry.value, entry.lower_95, entry.upper_95)


def share(value: float, low: float, high: float) -> str:
    return f"{100 * value:.1f} \\[{100 * low:.1f}, {100 * high:.1f}]"


def verdict(name: str) -> str:
    report, _ = read_report(HOME / f"{name}-evidence" / layout.REPORT)
    return {"passed": "[green]passed[/], promoted and served", "failed": "[red]blocked[/]"}[report.verdict]


def live_line(live: dict[str, list[Any]]) -> str:
    """What the sidecar found through the network."""
    found = [f"{sample.labels['attack']} {100 * sample.value:.1f} %" for sample in live[ROBUST[0]]]
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


def read(path: Path) -> dict[str, Any]:
    value: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return value


def wait_for(condition: Callable[[], Any], process: subprocess.Popen[bytes], what: str) -> None:
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
