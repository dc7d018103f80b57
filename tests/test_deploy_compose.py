"""The stack for one host: valid for compose, hardened, verified before it serves; and what Prometheus is told."""

from __future__ import annotations

import copy
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from dfmcl.serving.gateway import metrics as gateway_metrics
from dfmcl.serving.gateway.config import load_config
from tests.deploying import DEPLOY, OVERLAYS, ROOT, pods, rendered, tool

COMPOSE = DEPLOY / "compose.yaml"
SERVICES: dict[str, dict[str, Any]] = yaml.safe_load(COMPOSE.read_text(encoding="utf-8"))["services"]
PROMETHEUS = DEPLOY / "prometheus"


def test_compose_file_is_valid(tmp_path: Path) -> None:
    """By the schema of the compose specification; a misspelt key is noticed."""
    command = [tool("check-jsonschema"), "--builtin-schema", "vendor.compose-spec"]
    made = subprocess.run([*command, str(COMPOSE)], capture_output=True, text=True, check=False)
    assert made.returncode == 0, made.stdout
    wrong = tmp_path / "compose.yaml"
    wrong.write_text(COMPOSE.read_text().replace("read_only: true", "readonly: true"))
    assert subprocess.run([*command, str(wrong)], capture_output=True, check=False).returncode == 1


def weaknesses(service: dict[str, Any]) -> set[str]:
    """What a service lacks, in a word each."""
    found = set()
    if str(service.get("user", "0")).partition(":")[0] == "0" or service.get("privileged"):
        found.add("root")
    if service.get("read_only") is not True:
        found.add("writable root")
    if service.get("cap_drop") != ["ALL"] or service.get("cap_add"):
        found.add("capabilities")
    if "no-new-privileges:true" not in service.get("security_opt", []):
        found.add("escalation")
    if "mem_limit" not in service:
        found.add("resources")
    tag = service["image"].rpartition("/")[2].partition(":")[2]
    if tag in ("", "latest"):
        found.add("latest")
    if any(not str(port).startswith("127.0.0.1:") for port in service.get("ports", [])):
        found.add("open port")
    for volume in service.get("volumes", []):
        if volume[0] in "./$" and not volume.endswith(":ro"):
            found.add("writable mount")
    if any("token=" in word and "=${TRITON_ADMIN_TOKEN" not in word for word in service.get("command", [])):
        found.add("literal secret")
    return found


@pytest.mark.parametrize("name", SERVICES)
def test_every_service_is_hardened(name: str) -> None:
    """Non-root, read-only, no capability, no new privilege, bounded memory, a version, ports on loopback only."""
    assert weaknesses(SERVICES[name]) == set()


CHANGES: dict[str, Callable[[dict[str, Any]], Any]] = {
    "root": lambda service: service.pop("user"),
    "writable root": lambda service: service.update(read_only=False),
    "capabilities": lambda service: service.update(cap_add=["NET_ADMIN"]),
    "escalation": lambda service: service.pop("security_opt"),
    "resources": lambda service: service.pop("mem_limit"),
    "latest": lambda service: service.update(image="nvcr.io:5000/tritonserver"),
    "open port": lambda service: service.update(ports=["8001:8001"]),
    "writable mount": lambda service: service["volumes"].append("../model_repository:/models"),
    "literal secret": lambda service: service["command"].append("--http-restricted-api=trace:x-admin-token=abc"),
}


@pytest.mark.parametrize("weakness", CHANGES)
def test_each_weakness_is_noticed(weakness: str) -> None:
    """The check above can fail, by each of its words."""
    service = copy.deepcopy(SERVICES["triton"])
    CHANGES[weakness](service)
    assert weaknesses(service) == {weakness}


def test_nothing_is_served_before_it_is_verified() -> None:
    """Triton waits for `verify` to end with 0, the others for a Triton that serves the model; the same bytes."""
    verify, triton = SERVICES["verify"], SERVICES["triton"]
    assert triton["depends_on"] == {"verify": {"condition": "service_completed_successfully"}}
    assert verify["restart"] == "no"
    assert verify["network_mode"] == "none"
    (model,) = triton["volumes"]
    assert model in verify["volumes"]
    assert model.endswith(":ro")
    mounted = model.split(":")[1]
    assert verify["command"][:3] == ["dfmcl", "verify", mounted]
    assert f'/v2/models/{Path(mounted).name}/ready"' in triton["healthcheck"]["test"][-1]
    compile(triton["healthcheck"]["test"][-1], "healthcheck", "exec")
    for name in ("gateway", "watch"):
        assert SERVICES[name]["depends_on"] == {"triton": {"condition": "service_healthy"}}
    assert "ports" not in triton
    assert triton["networks"] == ["inside"]


def test_triton_has_the_clusters_arguments() -> None:
    """One list of flags in two places: they must not part."""
    (pod,) = [pod for pod in pods(rendered(OVERLAYS[0])) if pod.where == "Deployment triton"]
    (container,) = pod.spec["containers"]
    ours = [word.partition("${")[0] for word in SERVICES["triton"]["command"]]
    assert ours == [word.partition("$(")[0] for word in [*container["command"], *container["args"]]]
    assert SERVICES["triton"]["image"] == container["image"]
    exit_seconds = next(int(word.partition("=")[2]) for word in ours if word.startswith("--exit-timeout-secs"))
    assert int(SERVICES["triton"]["stop_grace_period"].removesuffix("s")) >= exit_seconds + 10


def test_files_that_are_mounted_exist() -> None:
    """Every path of the project that a service mounts is there, and so is every target that is built."""
    for service in SERVICES.values():
        for volume in service.get("volumes", []):
            source = volume.split(":")[0]
            if source.startswith("."):
                assert (DEPLOY / source).exists(), source
        if build := service.get("build"):
            assert (DEPLOY / build["context"] / build["dockerfile"]).is_file()


def test_prometheus_accepts_what_it_is_told() -> None:
    """`promtool check config`; every service that has metrics is scraped where it listens, under its own name."""
    command = [tool("promtool"), "check", "config", "prometheus.yml"]
    made = subprocess.run(command, cwd=PROMETHEUS, capture_output=True, text=True, check=False)
    assert made.returncode == 0, made.stdout + made.stderr
    for rules in (PROMETHEUS / "rules").iterdir():
        assert f"rules/{rules.name}: " not in made.stderr
        assert f"rules/{rules.name}" in made.stdout
    jobs = yaml.safe_load((PROMETHEUS / "prometheus.yml").read_text())["scrape_configs"]
    assert {job["job_name"] for job in jobs} == {"triton", "gateway", "watch"}
    for job in jobs:
        (target,) = job["static_configs"][0]["targets"]
        assert target.partition(":")[0] == job["job_name"]
        assert job["job_name"] in SERVICES
        if job["job_name"] == "gateway":
            listen = load_config(DEPLOY / "resnet18-cifar10" / "gateway.toml").listen
            assert target.partition(":")[2] == listen.admin.partition(":")[2]
            assert SERVICES["gateway"]["ports"] == [f"127.0.0.1:{listen.port}:{listen.port}"]


def test_rules_speak_of_metrics_that_the_gateway_has() -> None:
    """Names by its source, the latency objective by its buckets: a renamed metric would silence an alert for good."""
    rules = (PROMETHEUS / "rules" / "serving.yaml").read_text()
    source = (ROOT / "serving" / "gateway" / "metrics.py").read_text()
    named = {re.sub(r"_(count|bucket)$", "", name) for name in re.findall(r"\bgateway_\w+", rules) if ":" not in name}
    named -= {"gateway_requests_failed", "gateway_requests_slow"}  # these are recorded by the rules themselves
    assert named == {"gateway_request_duration_seconds", "gateway_endpoint_up"}
    assert {name for name in named if f'"{name}"' not in source} == set()
    assert {float(bound) for bound in re.findall(r'le="([\d.]+)"', rules)} <= set(gateway_metrics.SECONDS)
    assert set(re.findall(r'outcome!?="(\w+)"', rules)) <= set(gateway_metrics.OUTCOMES)


def mounts(name: str) -> dict[str, Path]:
    """By where it is seen inside: each file or folder of the project that a service mounts."""
    volumes = [volume.split(":") for volume in SERVICES[name]["volumes"] if volume.startswith(".")]
    return {inside: (DEPLOY / outside).resolve() for outside, inside, _ in volumes}


def test_the_profile_brings_all_that_watches() -> None:
    """Sidecar, Prometheus with the rules, Alertmanager, Grafana; and nothing of them without the profile."""
    watching = {name for name, service in SERVICES.items() if service.get("profiles") == ["watch"]}
    assert watching == {"watch", "prometheus", "alertmanager", "grafana"}
    config = yaml.safe_load((PROMETHEUS / "prometheus.yml").read_text())
    assert mounts("prometheus") == {"/etc/prometheus": PROMETHEUS}
    assert "--config.file=/etc/prometheus/prometheus.yml" in SERVICES["prometheus"]["command"]
    assert config["rule_files"] == ["rules/*.yaml"]
    assert config["alerting"]["alertmanagers"][0]["static_configs"][0]["targets"] == ["alertmanager:9093"]
    assert mounts("alertmanager") == {"/etc/alertmanager/alertmanager.yml": PROMETHEUS / "alertmanager.yml"}


def test_grafana_is_provisioned() -> None:
    """Data source and dashboards from files, the overview first; the provider looks where they are mounted."""
    found = mounts("grafana")
    provisioning = Path("/etc/grafana/provisioning")
    kinds = {
        Path(inside).relative_to(provisioning).parts[0]: path for inside, path in found.items() if "prov" in inside
    }
    assert set(kinds) == {"datasources", "dashboards"}
    (source,) = yaml.safe_load(kinds["datasources"].read_text())["datasources"]
    assert source["url"] == "http://prometheus:9090"
    scrapes = yaml.safe_load((PROMETHEUS / "prometheus.yml").read_text())["scrape_configs"]
    assert source["jsonData"]["timeInterval"] in {job.get("scrape_interval") for job in scrapes}
    (provider,) = yaml.safe_load(kinds["dashboards"].read_text())["providers"]
    folder = found[provider["options"]["path"]]
    assert {path.suffix for path in folder.iterdir()} == {".json"}
    home = Path(SERVICES["grafana"]["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"])
    assert str(home.parent) == provider["options"]["path"]
    assert (folder / home.name).is_file()


def test_alertmanager_routes_to_receivers_that_exist() -> None:
    """The file of the stack, by hand: Debian's amtool is not everywhere."""
    config = yaml.safe_load((PROMETHEUS / "alertmanager.yml").read_text())
    receivers = {entry["name"] for entry in config["receivers"]}
    assert {config["route"]["receiver"], *(route["receiver"] for route in config["route"]["routes"])} == receivers
