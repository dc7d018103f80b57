"""What the SRE sees and is woken by: rules that fire and keep silent, routes, dashboards that Prometheus answers."""

from __future__ import annotations

import itertools
import json
import re
import shlex
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import typer
import yaml
from prometheus_client import CollectorRegistry, generate_latest

import dfmcl.cli.command
from dfmcl.monitoring.budget import Budget
from dfmcl.monitoring.journal import Journal
from dfmcl.monitoring.metrics import RoundsCollector
from dfmcl.monitoring.releases import Attested, Release
from dfmcl.monitoring.results import GATEWAY, TRITON, AttackResult, Query, ReplayResult, RoundResult
from dfmcl.monitoring.snapshot import AttackInfo, Identity, Snapshot
from dfmcl.robustness.statistics import Share
from dfmcl.serving.gateway.metrics import DetectionMetrics, Metrics
from dfmcl.serving.gateway.pool import Pool
from tests import observing
from tests.deploying import DEPLOY, ROOT, tool
from tests.processes import wait_until

PROMETHEUS = DEPLOY / "prometheus"
ALERTS = {rule["alert"]: rule for rule in observing.rules() if "alert" in rule}
RUNBOOKS = ROOT / "docs" / "runbooks"
# Triton's, as it names them; its cache has metrics only where one is configured.
TRITONS = """
nv_inference_queue_duration_us{model="digits",version="1"} 5000
nv_inference_request_success{model="digits",version="1"} 10
nv_cache_num_hits_per_model{model="digits",version="1"} 0
"""


def sidecar_exposition() -> str:
    """The sidecar's own metrics, with every series that it may have: two versions, two paths, a round each."""
    attested = Attested(
        state="passed",
        model_sha256="a" * 64,
        policy_sha256="b" * 64,
        checkpoint_sha256="",
        norm="linf",
        epsilon="8/255",
        clean=Share(900, 1000),
        robust=Share(450, 1000),
        clean_threshold=0.8,
        robust_threshold=0.4,
        evaluated=1.79e9,
        transfer={("s", "mi-fgsm-10"): Share(700, 1000)},
        further_thresholds={("corruption", "fog@3"): 0.5},
    )
    attacks = AttackInfo("mi-fgsm-10", 10, "surrogate", "1" * 64), AttackInfo("square-100", 100, "", "2" * 64)
    paths = {TRITON: 60.0, GATEWAY: 300.0}
    identity = Identity("0.1.0", "0000000", "digits", "linf", "8/255", attacks, "s", paths)
    journal = Journal(limit=1e6)
    queries, held = (Query(64, 0.01), Query(1, 0.01, "timeout")), (True, True, False, False)
    for version, (via, attack) in itertools.product(("1", "2"), zip(paths, attacks, strict=True)):
        result = AttackResult(attack.name, held, 64)
        replay = ReplayResult(16, 0, 0.01) if via == TRITON else None
        right = (True, True, True, False)
        about = 1, via, "digits", version, "linf", "8/255", time.time(), 2.0
        journal = journal.after(RoundResult(*about, right, (result,), queries, replay))
    release = Release("passed", attested, verified=True, expires=time.time() + 90 * 86400)
    budget = Budget(20_000, 3600.0, 0.0)
    snapshot = Snapshot(journal, dict.fromkeys(("1", "2"), release), {}, budget)
    registry = CollectorRegistry()
    registry.register(RoundsCollector(identity, lambda: snapshot))
    return generate_latest(registry).decode()


def gateway_exposition() -> str:
    """The gateway's own metrics, with a number each."""
    pool = SimpleNamespace(endpoints=[SimpleNamespace(url="triton:8001", up=True)], resent=0, waiting=0)
    metrics = Metrics("0.1.0", cast(Pool, pool), lambda: True)
    detection = DetectionMetrics(metrics.registry)
    metrics.ended(200, None, 0.01, images=1, canary=False)
    detection.seconds.observe(0.001)
    for probe in ("", "attack", "benign"):
        detection.examined(probe, repeat=False)
    return metrics.exposition().decode()


KNOWN = observing.labels(sidecar_exposition() + gateway_exposition() + TRITONS)
RECORDED = {rule["record"] for rule in observing.rules() if "record" in rule}
EXPRESSIONS = {
    **{f"rule {rule.get('alert') or rule['record']}": rule["expr"] for rule in observing.rules()},
    **{f"{panel.board}: {panel.title}: {n}": panel.expression for n, panel in enumerate(observing.panels())},
}


def strangers(expression: str) -> set[str]:
    """What a query names that nobody exposes: metrics, labels and values in braces, and recordings."""
    found = {name for name in re.findall(r"\w+:[\w:]+", expression) if name not in RECORDED}
    for name, braces in re.findall(r"(?<![:\w])((?:robustness|gateway|nv)_\w+)(?![\w:])(?:{([^}]*)})?", expression):
        if name not in KNOWN:
            found.add(name)
        for label, operator, value in re.findall(r'(\w+)\s*(=~|!=|!~|=)\s*"([^"]*)"', braces):
            known = KNOWN.get(name, {}).get(label, {"up", value} if label == "job" else set())
            if not known or (operator in ("=", "!=") and value not in known):
                found.add(f"{name}{{{label}={value}}}")
    return found


def test_what_is_asked_for_is_exposed() -> None:
    """Metrics, labels and values of rules and dashboards exist: a renamed one would silence an alert for good."""
    assert {where: strangers(text) for where, text in EXPRESSIONS.items() if strangers(text)} == {}
    assert strangers('rate(robustness_probe_rounds{via="triton"}[5m])') == {
        "robustness_probe_rounds",
        "robustness_probe_rounds{via=triton}",
    }
    assert strangers('robustness_target_up{via="grpc"}') == {"robustness_target_up{via=grpc}"}
    assert strangers("model:robustness_loss:bool") == {"model:robustness_loss:bool"}


@pytest.mark.parametrize("path", [*observing.RULES, *PROMETHEUS.glob("*.test.yaml")], ids=lambda path: path.name)
def test_rules_do_what_their_tests_say(path: Path) -> None:
    """`promtool check rules` and `promtool test rules`."""
    check = "test" if path.name.endswith(".test.yaml") else "check"
    made = subprocess.run([tool("promtool"), check, "rules", path], cwd=PROMETHEUS, capture_output=True, text=True)
    assert made.returncode == 0, made.stdout + made.stderr


@pytest.mark.parametrize("name", ["serving", "robustness"])
def test_every_alert_is_seen_to_fire_and_to_keep_silent(name: str) -> None:
    """An alert that has never been seen to fire is not an alert, and one that always fires is not either."""
    rules = yaml.safe_load((PROMETHEUS / "rules" / f"{name}.yaml").read_text())
    alerts = {rule["alert"] for group in rules["groups"] for rule in group["rules"] if "alert" in rule}
    tests = yaml.safe_load((PROMETHEUS / f"{name}.test.yaml").read_text())["tests"]
    rows = [row for test in tests for row in test["alert_rule_test"]]
    assert {row["alertname"] for row in rows if row.get("exp_alerts")} == alerts
    assert {row["alertname"] for row in rows if not row.get("exp_alerts")} == alerts


def test_pages_are_facts_and_proofs() -> None:
    """Alerts that may wake a person are a closed list; the rest are tickets. Each has one sentence and a runbook."""
    pages = {name for name, rule in ALERTS.items() if rule["labels"]["severity"] == "critical"}
    assert {name for name in pages if name.startswith("Robustness")} == {
        "RobustnessLost",
        "RobustnessIntegrityMismatch",
        "RobustnessUngatedModelServing",
        "RobustnessTargetDown",
    }
    assert {rule["labels"]["severity"] for rule in ALERTS.values()} == {"critical", "warning"}
    for name, rule in ALERTS.items():
        assert set(rule["annotations"]) == {"summary", "description", "runbook_url"}
        assert rule["annotations"]["summary"].endswith(".")
        assert "{{" not in rule["annotations"]["summary"]
        assert rule["annotations"]["runbook_url"] == f"https://dfmcl.example/runbooks/{name}"


def test_every_alert_has_a_runbook() -> None:
    """One page an alert and no other; each says what it means, what to check, what to do, when it is false."""
    pages = {path.stem: path.read_text() for path in RUNBOOKS.glob("*.md")}
    assert set(pages) == set(ALERTS)
    overview = (ROOT / "docs" / "sre.md").read_text()
    for name, text in pages.items():
        assert text.startswith(f"# {name}\n")
        assert re.findall(r"^## (.+)$", text, flags=re.MULTILINE) == ["Meaning", "Check", "Do", "False alarm"]
        assert f"runbooks/{name}.md" in overview


def test_runbooks_name_commands_that_exist() -> None:
    """Every line that begins with dfmcl is parsed by it: at night nobody wants to look up an option."""
    group: Any = typer.main.get_command(dfmcl.cli.command.app)
    lines = {
        line.strip()
        for path in [*RUNBOOKS.glob("*.md"), ROOT / "docs" / "sre.md"]
        for line in path.read_text().splitlines()
        if line.startswith("    dfmcl ")
    }
    assert {line.split()[1] for line in lines} >= {"status", "history", "verify", "rollback", "watch", "gate", "sign"}
    for line in lines:
        _, name, *words = shlex.split(line)
        if words != ["--help"]:
            group.commands[name].make_context(name, words)
    with pytest.raises(Exception, match="No such option"):
        group.commands["status"].make_context("status", ["--repositories", "models"])


def routed(**labels: str) -> str:
    """The receiver, by amtool."""
    words = [f"{label}={value}" for label, value in labels.items()]
    config = ["--config.file", str(PROMETHEUS / "alertmanager.yml")]
    made = subprocess.run(
        [tool("amtool"), "config", "routes", "test", *config, *words], capture_output=True, text=True, check=True
    )
    return made.stdout.strip()


def test_pages_page_and_tickets_wait() -> None:
    """`amtool check-config`, and every alert's way: critical to the pager, everything else to the tracker."""
    made = subprocess.run(
        [tool("amtool"), "check-config", PROMETHEUS / "alertmanager.yml"], capture_output=True, text=True
    )
    assert made.returncode == 0, made.stdout + made.stderr
    ways = {"critical": "page", "warning": "ticket"}
    for name, rule in ALERTS.items():
        assert routed(alertname=name, model="m", **rule["labels"]) == ways[rule["labels"]["severity"]]
    assert routed(alertname="SomebodyElses") == "ticket"


@pytest.fixture(scope="module")
def alertmanager(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with observing.start_alertmanager(tmp_path_factory.mktemp("alertmanager")) as url:
        yield url


def states(url: str, *alerts: dict[str, str]) -> dict[str, str]:
    """Of alerts that are sent together what becomes of each: active or suppressed."""
    ends = (datetime.now(UTC) + timedelta(minutes=5)).isoformat()
    observing.fetch(f"{url}/api/v2/alerts", [{"labels": labels, "endsAt": ends} for labels in alerts])

    def seen() -> dict[str, str]:
        model = alerts[0]["model"] if "model" in alerts[0] else alerts[0]["job"]
        entries = observing.fetch(f"{url}/api/v2/alerts")
        ours = [e for e in entries if model in (e["labels"].get("model"), e["labels"].get("job"))]
        return {entry["labels"]["alertname"]: entry["status"]["state"] for entry in ours}

    names = {labels["alertname"] for labels in alerts}
    wait_until(lambda: names <= set(seen()) and "unprocessed" not in seen().values(), seconds=30)
    return seen()


def test_the_cause_is_told_and_not_what_follows(alertmanager: str) -> None:
    """A real Alertmanager: a mismatch explains a loss, a target that is down its old figures, for its model alone."""

    def alert(name: str, model: str, **labels: str) -> dict[str, str]:
        return {"alertname": name, "job": "watch", "model": model, **labels}

    mismatch = alert("RobustnessIntegrityMismatch", "a", version="1"), alert("RobustnessLost", "a", version="1")
    assert states(alertmanager, *mismatch) == {
        "RobustnessIntegrityMismatch": "active",
        "RobustnessLost": "suppressed",
    }
    other = alert("RobustnessIntegrityMismatch", "b", version="1"), alert("RobustnessLost", "b", version="2")
    assert set(states(alertmanager, *other).values()) == {"active"}
    down = alert("RobustnessTargetDown", "c"), alert("RobustnessProbeStale", "c", via="triton")
    more = *down, alert("RobustnessDegraded", "c", version="1"), alert("RobustnessGateExpiresSoon", "c", version="1")
    assert states(alertmanager, *more) == {
        "RobustnessTargetDown": "active",
        "RobustnessProbeStale": "suppressed",
        "RobustnessDegraded": "suppressed",
        "RobustnessGateExpiresSoon": "active",
    }
    lost = alert("RobustnessLost", "d", version="1"), alert("RobustnessDegraded", "d", version="1")
    assert states(alertmanager, *lost) == {"RobustnessLost": "active", "RobustnessDegraded": "suppressed"}
    absent = {"alertname": "RobustnessProbeAbsent", "job": "else"}, {"alertname": "RobustnessProbeStale", "job": "else"}
    assert states(alertmanager, *absent) == {
        "RobustnessProbeAbsent": "active",
        "RobustnessProbeStale": "suppressed",
    }


def test_dashboards_are_what_their_script_writes(tmp_path: Path) -> None:
    """`make dashboards` would change nothing."""
    pytest.importorskip("grafana_foundation_sdk")
    subprocess.run([sys.executable, DEPLOY / "grafana" / "dashboards.py", tmp_path], check=True)
    written = {path.name: path.read_text() for path in tmp_path.iterdir()}
    assert written == {path.name: path.read_text() for path in observing.BOARDS.iterdir()}


@pytest.mark.parametrize("path", sorted(observing.BOARDS.glob("*.json")), ids=lambda path: path.stem)
def test_dashboards_keep_the_conventions(path: Path) -> None:
    """A stable uid, a data source to choose, and for each panel what it is, what it means, and in which unit."""
    board = json.loads(path.read_text())
    assert re.fullmatch(r"dfmcl-[a-z-]+", board["uid"])
    assert board["title"]
    assert board["description"]
    variables = {variable["name"] for variable in board["templating"]["list"]}
    assert {"datasource", "model"} <= variables
    shown = [panel for panel in board["panels"] if panel["type"] != "row"]
    assert len({panel["id"] for panel in shown}) == len(shown)
    for panel in shown:
        assert panel["title"]
        assert panel["description"].endswith(".")
        assert panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
        assert panel["type"] == "table" or panel["fieldConfig"]["defaults"]["unit"]
        for target in panel["targets"]:
            assert not re.search(r"\[\d+[smhd]\]", target["expr"])  # what Grafana computes fits the step
            assert set(re.findall(r"\$(\w+)", target["expr"])) <= variables | {"__rate_interval"}


def test_the_first_row_answers_the_question() -> None:
    """Is it still robust? Proof of loss, verdict, integrity, an answer, and how old all this is, before all else."""
    board = json.loads((observing.BOARDS / "robustness-overview.json").read_text())
    top = [panel for panel in board["panels"] if panel["gridPos"]["y"] == 1]
    asked = " ".join(target["expr"] for panel in top for target in panel["targets"])
    for name in ("loss_proven", "gate_state", "target_integrity", "target_up", "probe_last_success_timestamp_seconds"):
        assert f"robustness_{name}" in asked
    (worst,) = [panel for panel in board["panels"] if "robustness_worst_case_accuracy_ratio" in str(panel)]
    assert worst["title"].startswith("Upper bound of robust accuracy")
    live = ("worst_case_accuracy_mean_lower", "worst_case_accuracy_mean_upper", "worst_case_accuracy_stretch_upper")
    for name in ("gate_accuracy", "gate_threshold", *live):
        assert f"robustness_{name}_ratio" in str(worst)


@pytest.fixture(scope="module")
def sidecar() -> SimpleNamespace:
    """What a sidecar exposes, and how a test changes it."""
    return SimpleNamespace(text=observing.growing(sidecar_exposition()), change=lambda text: text)


@pytest.fixture(scope="module")
def prometheus(tmp_path_factory: pytest.TempPathFactory, sidecar: SimpleNamespace, alertmanager: str) -> Iterator[str]:
    """A real one with the shipped rules, that scrapes sidecar, gateway and Triton every second."""
    gateway, triton = (observing.growing(text) for text in (gateway_exposition(), TRITONS))
    with (
        observing.exposed(lambda: sidecar.change(sidecar.text())) as watch,
        observing.exposed(gateway) as at_gateway,
        observing.exposed(triton) as at_triton,
        observing.start_prometheus(
            tmp_path_factory.mktemp("prometheus"),
            {"watch": watch, "gateway": at_gateway, "triton": at_triton},
            alertmanager=alertmanager,
        ) as url,
    ):
        yield url


def test_every_panel_shows_something(prometheus: str) -> None:
    """Each query of each dashboard returns a number from a Prometheus that scraped; one of nothing does not."""
    observing.every_panel_returns_data(prometheus)
    assert observing.query(prometheus, observing.filled('robustness_target_up{model=~"$model",via="grpc"}')) == []
    assert len(observing.panels()) > 60


def test_a_rollback_ends_the_page(tmp_path: Path) -> None:
    """By a real Prometheus, where a minute is a second: version 2 is lost and pages, 1 answers again and silence falls.

    What is proven of version 2 stays proven; only that it no longer answers ends the page.
    """
    text, rolled_back = observing.growing(sidecar_exposition()), threading.Event()
    lost = 'robustness_loss_proven{model="digits",reason="transfer",version="2"}'
    idle = re.compile(r'^(robustness_clean_samples_total{model="digits",version="(\d)"}) \S+$', flags=re.MULTILINE)

    def exposition() -> str:
        silent = "2" if rolled_back.is_set() else "1"
        return idle.sub(lambda m: f"{m[1]} 1000" if m[2] == silent else m[0], text()).replace(f"{lost} 0", f"{lost} 1")

    rules = observing.hastened(tmp_path)
    with (
        observing.exposed(exposition) as watch,
        observing.start_prometheus(tmp_path, {"watch": watch}, rules=rules) as url,
    ):
        wait_until(lambda: "RobustnessLost" in observing.firing(url), seconds=30)
        rolled_back.set()
        wait_until(lambda: "RobustnessLost" not in observing.firing(url), seconds=60)
        assert observing.query(url, f"{lost} == 1")


def test_rules_are_evaluated_without_error(prometheus: str) -> None:
    """On every series of the sample at once: many-to-many matches would only show here."""

    def healths() -> set[str]:
        groups = observing.fetch(f"{prometheus}/api/v1/rules")["data"]["groups"]
        return {rule["health"] for group in groups for rule in group["rules"]}

    wait_until(lambda: "unknown" not in healths(), seconds=30)
    assert healths() == {"ok"}


def test_a_mismatch_reaches_the_pager(prometheus: str, alertmanager: str, sidecar: SimpleNamespace) -> None:
    """From the sidecar's metric over Prometheus to Alertmanager's pager, which knows nothing of it before."""

    def receivers() -> list[list[str]]:
        entries: list[dict[str, Any]] = observing.fetch(f"{alertmanager}/api/v2/alerts?filter=model%3Ddigits")
        mismatches = [e for e in entries if e["labels"]["alertname"] == "RobustnessIntegrityMismatch"]
        return [[receiver["name"] for receiver in entry["receivers"]] for entry in mismatches]

    proven = 'robustness_loss_proven{model="digits",reason="integrity",version="2"}'
    assert "RobustnessIntegrityMismatch" not in observing.firing(prometheus)
    sidecar.change = lambda text: text.replace(f"{proven} 0.0", f"{proven} 1.0")
    wait_until(receivers, seconds=30)
    assert receivers() == [["page"]]
    sidecar.change = lambda text: text
