"""A real Prometheus and a real Alertmanager on loopback, and what rules and dashboards ask of them."""

from __future__ import annotations

import json
import math
import re
import socket
import subprocess
import threading
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from prometheus_client.parser import text_string_to_metric_families

from tests.deploying import DEPLOY, tool
from tests.processes import wait_until

RULES = tuple(sorted((DEPLOY / "prometheus" / "rules").glob("*.yaml")))
BOARDS = DEPLOY / "grafana" / "dashboards"


class Panel(NamedTuple):
    """A question of a dashboard."""

    board: str
    title: str
    expression: str


def panels() -> list[Panel]:
    """Every query of every panel of the committed dashboards."""
    return [
        Panel(path.stem, panel["title"], target["expr"])
        for path in sorted(BOARDS.glob("*.json"))
        for panel in json.loads(path.read_text(encoding="utf-8"))["panels"]
        for target in panel.get("targets", [])
    ]


def rules() -> list[dict[str, Any]]:
    """Every recording and alerting rule, by file and group."""
    texts = [yaml.safe_load(path.read_text(encoding="utf-8")) for path in RULES]
    return [rule for text in texts for group in text["groups"] for rule in group["rules"]]


def hastened(folder: Path, rules: Sequence[Path] = RULES) -> list[Path]:
    """Copies of the rules in which an hour is a minute and a minute a second, in waits and in windows."""
    copies = [folder / f"hastened-{path.name}" for path in rules]
    for path, copy in zip(rules, copies, strict=True):
        text = re.sub(r"(\[|\boffset |for: )(\d+)m\b", r"\1\2s", path.read_text(encoding="utf-8"))
        copy.write_text(re.sub(r"(\[|\boffset |for: )(\d+)h\b", r"\1\2m", text), encoding="utf-8")
    return copies


def labels(exposition: str) -> dict[str, dict[str, set[str]]]:
    """Of each series' name its labels, and the values that they have."""
    found: dict[str, dict[str, set[str]]] = {}
    for family in text_string_to_metric_families(exposition):
        for sample in family.samples:
            of_name = found.setdefault(sample.name, {})
            for label, value in sample.labels.items():
                of_name.setdefault(label, set()).add(value)
    return found


def growing(exposition: str) -> Callable[[], str]:
    """An exposition whose counters and histograms grow by their own values with every scrape."""
    scrapes = 0
    counting = re.compile(r"^(\w+_(?:total|count|sum|bucket)(?:{.*})?) (\S+)$", flags=re.MULTILINE)

    def text() -> str:
        nonlocal scrapes
        scrapes += 1
        return counting.sub(lambda line: f"{line[1]} {float(line[2]) * scrapes}", exposition)

    return text


@contextmanager
def exposed(text: Callable[[], str]) -> Iterator[str]:
    """host:port of a server whose /metrics is that text."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = text().encode()
            self.send_response(200)
            self.send_header("Content-Type", "text/plain; version=0.0.4")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: Any) -> None:
            """Nothing: a test's output is its own."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()


@contextmanager
def start_prometheus(
    folder: Path,
    targets: Mapping[str, str],
    *,
    rules: Sequence[Path] = RULES,
    alertmanager: str | None = None,
    interval: str = "1s",
) -> Iterator[str]:
    """The URL of a Prometheus that scrapes and judges every `interval`.

    targets: host:port by job, with the job names of prometheus.yml: watch, gateway, triton. rules: files, by default
    the shipped ones, with the waiting that they ask for; `hastened` makes quicker ones. alertmanager: a URL of
    start_alertmanager.
    """
    hosts = [alertmanager.removeprefix("http://")] if alertmanager else []
    config = {
        "global": {"scrape_interval": interval, "scrape_timeout": interval, "evaluation_interval": interval},
        "rule_files": [str(path) for path in rules],
        "alerting": {"alertmanagers": [{"static_configs": [{"targets": hosts}]}]},
        "scrape_configs": [
            {"job_name": job, "static_configs": [{"targets": [target]}]} for job, target in targets.items()
        ],
    }
    path, url = folder / "prometheus.yml", f"http://127.0.0.1:{free_port()}"
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    words = ["--storage.tsdb.path", str(folder / "tsdb"), "--web.listen-address", url.removeprefix("http://")]
    with _started([tool("prometheus"), "--config.file", str(path), *words], url, folder / "prometheus.log"):
        yield url


@contextmanager
def start_alertmanager(folder: Path, config: Path = DEPLOY / "prometheus" / "alertmanager.yml") -> Iterator[str]:
    """The URL of an Alertmanager by that file."""
    url = f"http://127.0.0.1:{free_port()}"
    words = ["--config.file", str(config), "--storage.path", str(folder / "alertmanager")]
    words += ["--web.listen-address", url.removeprefix("http://"), "--cluster.listen-address", ""]
    with _started([tool("prometheus-alertmanager"), *words], url, folder / "alertmanager.log"):
        yield url


def free_port() -> int:
    """A port of loopback that nobody listened on a moment ago."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@contextmanager
def _started(command: list[str], url: str, log: Path) -> Iterator[None]:
    with log.open("wb") as output, subprocess.Popen(command, stdout=output, stderr=output) as process:
        try:
            wait_until(lambda: _ready(f"{url}/-/ready"), process)
            yield
        finally:
            process.terminate()


def _ready(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=2) as reply:
            return bool(reply.status == 200)
    except OSError:
        return False


def fetch(url: str, body: Any = None) -> Any:
    """The JSON of an answer; a body makes it a POST."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=10) as reply:
        text = reply.read()
    return json.loads(text) if text else None


def query(url: str, promql: str) -> list[tuple[dict[str, str], float]]:
    """What a Prometheus answers now: labels and value of each series."""
    found = fetch(f"{url}/api/v1/query?{urllib.parse.urlencode({'query': promql})}")["data"]["result"]
    return [(entry["metric"], float(entry["value"][1])) for entry in found]


def firing(url: str) -> set[str]:
    """Names of the alerts that a Prometheus would send now."""
    return {series["alertname"] for series, _ in query(url, 'ALERTS{alertstate="firing"}')}


def dataless(url: str) -> list[Panel]:
    """Panels whose query has no number."""
    return [one for one in panels() if all(math.isnan(value) for _, value in query(url, filled(one.expression)))]


def filled(expression: str, rate_interval: str = "1m") -> str:
    """A panel's query as Grafana would send it, with all models and versions chosen."""
    return re.sub(r"\$(model|version)\b", ".+", expression.replace("$__rate_interval", rate_interval))


def every_panel_returns_data(prometheus_url: str, *, seconds: float = 60) -> None:
    """Within so many seconds every query of every dashboard returns a number; an error names the others."""
    try:
        wait_until(lambda: not dataless(prometheus_url), seconds=seconds)
    except AssertionError:
        missing = dataless(prometheus_url)
        assert not missing, missing
