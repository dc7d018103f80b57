"""Manifests: rendered by kubectl, valid for Kubernetes, hardened, in agreement with each other and with the code."""

from __future__ import annotations

import copy
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from dfmcl.serving.gateway.config import load_config
from dfmcl.serving.triton import docker
from dfmcl.serving.triton.process import RESTRICTED
from tests.deploying import BUCKET, DEPLOY, JOBS, MODEL, OURS, OVERLAYS, Pod, named, pods, rendered, tool, weaknesses

KUBERNETES = "1.35"  # the oldest that the base names: image volumes are on by default
# What operators bring; their schemas are not Kubernetes'. The pods inside are validated all the same.
CUSTOM = {"PodMonitor", "PrometheusRule", "ServingRuntime", "InferenceService", "PyTorchJob"}
SOURCES = [*OVERLAYS, *JOBS]
# What its operator brings along; docs and comments say how.
SECRETS, CLAIMS = {"triton-admin", "dfmcl-gate-key", "bucket-reader"}, {"probe-images", "dfmcl-data"}


@pytest.mark.parametrize("source", SOURCES)
def test_every_object_is_valid(source: str) -> None:
    """Strictly: an unknown key is an error. Pods inside custom objects are validated as pods."""
    objects = rendered(source)
    for entry in objects:
        if entry["kind"] in CUSTOM:
            assert re.fullmatch(r"[a-z.]+/v\w+", entry["apiVersion"])
        else:
            kubernetes_validate.validate(entry, KUBERNETES, strict=True)
    for pod in pods([entry for entry in objects if entry["kind"] != "Deployment"]):
        as_pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "x"}, "spec": pod.spec}
        kubernetes_validate.validate(as_pod, KUBERNETES, strict=True)


def test_an_invalid_object_is_noticed() -> None:
    """The check above can fail: a key that is misspelt."""
    wrong = copy.deepcopy(named(rendered(OVERLAYS[0]), "Deployment", "triton"))
    wrong["spec"]["template"]["spec"]["containers"][0]["readynessProbe"] = {}
    with pytest.raises(kubernetes_validate.ValidationError, match="readynessProbe"):
        kubernetes_validate.validate(wrong, KUBERNETES, strict=True)


@pytest.mark.parametrize("source", SOURCES)
def test_every_pod_is_hardened(source: str) -> None:
    """Non-root, read-only, no capability, seccomp, resources, no account, a tag with a version, no literal secret."""
    found = list(pods(rendered(source)))
    assert found
    assert {pod.where: weaknesses(pod) for pod in found if weaknesses(pod)} == {}


CHANGES: dict[str, Callable[[dict[str, Any], dict[str, Any]], Any]] = {
    "service account token": lambda spec, _: spec.pop("automountServiceAccountToken"),
    "root": lambda spec, _: spec["securityContext"].update(runAsUser=0),
    "seccomp": lambda spec, _: spec["securityContext"].pop("seccompProfile"),
    "host": lambda spec, _: spec.update(hostNetwork=True),
    "host path": lambda spec, _: spec["volumes"].append({"name": "x", "hostPath": {"path": "/"}}),
    "escalation": lambda _, container: container["securityContext"].update(privileged=True),
    "writable root": lambda _, container: container["securityContext"].pop("readOnlyRootFilesystem"),
    "capabilities": lambda _, container: container["securityContext"].update(capabilities={"add": ["SYS_ADMIN"]}),
    "resources": lambda _, container: container["resources"]["limits"].pop("memory"),
    "latest": lambda _, container: container.update(image="nvcr.io:5000/tritonserver"),
    "literal secret": lambda _, container: container["args"].append("--http-restricted-api=trace:x-admin-token=abc"),
}


@pytest.mark.parametrize("weakness", CHANGES)
def test_each_weakness_is_noticed(weakness: str) -> None:
    """The check above can fail, by each of its words."""
    (pod,) = [pod for pod in pods(rendered(OVERLAYS[0])) if pod.where == "Deployment triton"]
    spec = copy.deepcopy(pod.spec)
    CHANGES[weakness](spec, spec["containers"][0])
    assert weaknesses(Pod("x", spec, {})) == {weakness}


@pytest.mark.parametrize("source", SOURCES)
def test_what_pods_name_is_there(source: str) -> None:
    """ConfigMaps are generated here, secrets and claims are the ones the comments name, mounts have their volume."""
    objects = rendered(source)
    maps = {entry["metadata"]["name"] for entry in objects if entry["kind"] == "ConfigMap"} | {"dfmcl-gate-policy"}
    for pod in pods(objects):
        volumes = {volume["name"]: volume for volume in pod.spec["volumes"]}
        assert len(volumes) == len(pod.spec["volumes"])
        for volume in volumes.values():
            assert volume.get("configMap", {}).get("name", "dfmcl-gate-policy") in maps
            assert volume.get("secret", {}).get("secretName", "triton-admin") in SECRETS
            assert volume.get("persistentVolumeClaim", {}).get("claimName", "probe-images") in CLAIMS
            assert not volume.get("image", {}).get("reference", ":tag").endswith(":latest")
        for container in pod.containers:
            mounts = container["volumeMounts"]
            assert {mount["name"] for mount in mounts} <= set(volumes)
            for entry in container.get("env", []):
                assert entry.get("valueFrom", {}).get("secretKeyRef", {}).get("name", "triton-admin") in SECRETS
            for entry in container.get("envFrom", []):
                assert entry["secretRef"]["name"] in SECRETS
            for mount in mounts:  # what is not scratch is read-only
                scratch = "emptyDir" in volumes[mount["name"]] or (mount["mountPath"] == "/data" and source in JOBS)
                assert scratch or mount["readOnly"] is True, (pod.where, mount)


def ports(pod: Pod) -> dict[str, int]:
    return {port["name"]: port["containerPort"] for port in pod.spec["containers"][0]["ports"]}


def selected(objects: list[dict[str, Any]], labels: dict[str, str]) -> Pod:
    (found,) = [pod for pod in pods(objects) if labels.items() <= pod.labels.items()]
    return found


def test_selectors_and_ports_meet_pods() -> None:
    """Services, monitors, budgets and the autoscaler are about pods that are there, by ports that they have."""
    objects = rendered(OVERLAYS[0])
    for entry in objects:
        spec = entry.get("spec", {})
        if entry["kind"] == "Service":
            offered = ports(selected(objects, spec["selector"]))
            assert {port["targetPort"] for port in spec["ports"]} <= set(offered)
        elif entry["kind"] == "PodMonitor":
            offered = ports(selected(objects, spec["selector"]["matchLabels"]))
            assert {endpoint["port"] for endpoint in spec["podMetricsEndpoints"]} <= set(offered)
        elif entry["kind"] == "HorizontalPodAutoscaler":
            target = named(objects, spec["scaleTargetRef"]["kind"], spec["scaleTargetRef"]["name"])
            assert "replicas" not in target["spec"]  # `kubectl apply` would undo what the autoscaler did
            assert spec["minReplicas"] >= 2
            assert spec["behavior"]["scaleDown"]["stabilizationWindowSeconds"] >= 300
        elif entry["kind"] == "PodDisruptionBudget":
            assert selected(objects, spec["selector"]["matchLabels"])
            assert spec["maxUnavailable"] == 1
    scaler = named(objects, "HorizontalPodAutoscaler", "triton")["spec"]
    adapter = yaml.safe_load((DEPLOY / "kubernetes" / "prometheus-adapter.yaml").read_text())
    metric = scaler["metrics"][0]["pods"]["metric"]["name"]
    assert [rule["seriesQuery"].partition("{")[0] for rule in adapter["rules"]["custom"]] == [metric]


def test_nothing_speaks_to_triton_but_gateway_prober_and_prometheus() -> None:
    """All is denied first. gRPC from two, metrics from Prometheus, HTTP from nobody; Triton itself calls nobody."""
    objects = rendered(OVERLAYS[0])
    policies = {entry["metadata"]["name"]: entry["spec"] for entry in objects if entry["kind"] == "NetworkPolicy"}
    assert policies["default-deny"] == {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}
    label, port_names = "app.kubernetes.io/name", ports(selected(objects, {"app.kubernetes.io/name": "triton"}))
    to_triton = [spec for spec in policies.values() if spec["podSelector"] == {"matchLabels": {label: "triton"}}]
    (spec,) = to_triton
    assert "egress" not in spec
    allowed = {rule["ports"][0]["port"]: rule["from"] for rule in spec["ingress"]}
    assert set(allowed) == {"grpc", "metrics"} <= set(port_names)
    (by_grpc,) = allowed["grpc"]
    assert by_grpc == {
        "podSelector": {"matchExpressions": [{"key": label, "operator": "In", "values": ["gateway", "watch"]}]}
    }
    (by_metrics,) = allowed["metrics"]
    assert by_metrics["podSelector"]["matchLabels"] == {label: "prometheus"}
    strangers, scrapes = policies["gateway"]["ingress"]
    assert ([port["port"] for port in strangers["ports"]], scrapes["ports"]) == (["http"], [{"port": "admin"}])
    assert scrapes["from"] == [by_metrics]
    for name in ("gateway", "watch"):
        offered = ports(selected(objects, {label: name}))
        assert {port["port"] for rule in policies[name]["ingress"] for port in rule["ports"]} <= set(offered)


def argument(words: list[str], flag: str) -> str:
    (found,) = [word.partition("=")[2] for word in words if word.startswith(f"{flag}=")]
    return found


@pytest.mark.parametrize("overlay", [overlay for overlay in OVERLAYS if overlay != BUCKET])
def test_triton_is_run_as_the_code_says(overlay: str) -> None:
    """Image, flags and what needs the token are serving's; only verified bytes are below /models."""
    pod = triton_pod(overlay)
    (verify,), (triton,) = pod.spec["initContainers"], pod.spec["containers"]
    words = [*triton["command"], *triton["args"]]
    gpu = overlay.endswith("gpu")
    assert set(docker.triton_arguments(gpu=gpu)) <= set(words)
    assert triton["image"] == docker.IMAGE
    assert ("nvidia.com/gpu" in triton["resources"]["limits"]) == gpu
    for flag in ("--http-restricted-api", "--grpc-restricted-protocol"):
        groups, _, token = argument(words, flag).partition(":")
        assert set(groups.split(",")) == set(RESTRICTED.split(","))
        assert token == "x-admin-token=$(ADMIN_TOKEN)"
    below = [mount for mount in triton["volumeMounts"] if mount["mountPath"].startswith("/models")]
    assert below == [mount for mount in verify["volumeMounts"] if mount["mountPath"].startswith("/models")]
    assert below == [{"name": "model", "mountPath": f"/models/{MODEL}", "subPath": MODEL, "readOnly": True}]
    assert verify["command"][2] == below[0]["mountPath"]


def test_a_bucket_is_copied_before_triton_and_followed_beside_it() -> None:
    """Once as an init container, then as a sidecar; they alone write where Triton reads, by the trust file."""
    objects, pod = rendered(BUCKET), triton_pod(BUCKET)
    once, follow = pod.spec["initContainers"]
    (triton,) = pod.spec["containers"]
    assert once["command"] == [*follow["command"], "--once"]
    assert follow["command"][follow["command"].index("--trust") + 1] == "/etc/dfmcl/trust.toml"
    assert (once.get("restartPolicy"), follow["restartPolicy"]) == (None, "Always")
    volumes = {volume["name"]: volume for volume in pod.spec["volumes"]}
    for container in (once, follow):
        assert {"name": "model", "mountPath": "/models"} in container["volumeMounts"]
        assert {"name": "trust", "mountPath": "/etc/dfmcl", "readOnly": True} in container["volumeMounts"]
    assert {"name": "model", "mountPath": "/models", "readOnly": True} in triton["volumeMounts"]
    assert "emptyDir" in volumes["model"]
    plain = triton_pod(OVERLAYS[0]).spec["containers"][0]["args"]
    added = ["--model-control-mode=poll", "--repository-poll-secs=2"]
    assert triton["args"] == [plain[0], *added, *plain[2:]]
    assert plain[1] == "--model-control-mode=none"
    reader = {"secretRef": {"name": "bucket-reader"}}
    watch = selected(objects, {"app.kubernetes.io/name": "watch"}).spec["containers"][0]
    assert all(container["envFrom"] == [reader] for container in (once, follow, watch))
    policy = named(objects, "NetworkPolicy", "to-bucket")["spec"]
    assert policy["podSelector"]["matchExpressions"][0]["values"] == ["triton", "watch"]
    assert [rule["ports"][0]["port"] for rule in policy["egress"]] == [443, 53]


def triton_pod(overlay: str) -> Pod:
    (pod,) = [pod for pod in pods(rendered(overlay)) if pod.spec.get("initContainers")]
    return pod


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_probes_and_shutdown_fit(overlay: str) -> None:
    """Ready means ready and live means live; the grace period outlasts preStop, Triton's own exit timeout and 10 s."""
    pod = triton_pod(overlay)
    (triton,) = pod.spec["containers"]
    assert (
        triton["startupProbe"]["httpGet"]["path"] == triton["readinessProbe"]["httpGet"]["path"] == "/v2/health/ready"
    )
    assert triton["livenessProbe"]["httpGet"]["path"] == "/v2/health/live"
    assert triton["startupProbe"]["failureThreshold"] * triton["startupProbe"]["periodSeconds"] >= 300
    pause = triton["lifecycle"]["preStop"]["sleep"]["seconds"]
    exit_seconds = int(argument(triton["args"], "--exit-timeout-secs"))
    assert pod.spec["terminationGracePeriodSeconds"] >= pause + exit_seconds + 10


def test_the_gateway_may_finish(tmp_path: Path) -> None:
    """Its ConfigMap is a configuration; grace outlasts notice and drain; the port is the one that is probed."""
    objects = rendered(OVERLAYS[0])
    path = tmp_path / "gateway.toml"
    path.write_text(named(objects, "ConfigMap", "gateway")["data"]["gateway.toml"])
    config = load_config(path)
    pod = selected(objects, {"app.kubernetes.io/name": "gateway"})
    assert ports(pod) == {"http": config.listen.port, "admin": int(config.listen.admin.rpartition(":")[2])}
    (container,) = pod.spec["containers"]
    assert {container[f"{kind}Probe"]["httpGet"]["port"] for kind in ("startup", "readiness", "liveness")} == {"admin"}
    monitor = named(objects, "PodMonitor", "gateway")["spec"]
    assert [endpoint["port"] for endpoint in monitor["podMetricsEndpoints"]] == ["admin"]
    assert [port["targetPort"] for port in named(objects, "Service", "gateway")["spec"]["ports"]] == ["http"]
    grace = config.listen.notice_seconds + config.listen.drain_seconds + 10
    assert pod.spec["terminationGracePeriodSeconds"] >= grace
    (endpoint,) = config.triton.endpoints
    service = named(objects, "Service", "triton")
    assert endpoint == f"triton:{service['spec']['ports'][0]['port']}"
    assert service["spec"]["clusterIP"] == "None"
    assert not config.open


def test_a_changed_configuration_is_a_rollout() -> None:
    """ConfigMaps that pods mount carry a hash of their content, and pods name them by it, also KServe's."""
    for overlay in OVERLAYS:
        names = {entry["metadata"]["name"] for entry in rendered(overlay) if entry["kind"] == "ConfigMap"}
        names -= {"dashboards"}  # read by Grafana, mounted by nobody
        assert {re.sub(r"-[a-z0-9]{10}$", "", name) for name in names} == {"trust", "gateway", "watch"}
        assert all(re.search(r"-[a-z0-9]{10}$", name) for name in names)


def test_our_images_are_targets_of_the_dockerfile() -> None:
    """dfmcl-NAME is built by target NAME, wherever it is named."""
    text = (DEPLOY / "images" / "Dockerfile").read_text()
    targets = set(re.findall(r"^FROM \S+ AS (\w+)$", text, flags=re.MULTILINE))
    found = {
        str(image).rpartition("/")[2].partition(":")[0]
        for source in SOURCES
        for pod in pods(rendered(source))
        for image in [
            *(container["image"] for container in pod.containers),
            *(volume["image"]["reference"] for volume in pod.spec["volumes"] if "image" in volume),
        ]
    }
    assert {name.removeprefix(OURS) for name in found if name.startswith(OURS)} <= targets
    assert {name for name in found if not name.startswith(OURS)} == {"tritonserver"}


def test_overlays_can_pin_digests(tmp_path: Path) -> None:
    """`images:` with a digest reaches every container and the volume that holds the model."""
    digest = f"sha256:{'0' * 64}"
    pins = yaml.safe_load((DEPLOY / OVERLAYS[0] / "kustomization.yaml").read_text())["images"]
    (tmp_path / "kustomization.yaml").write_text(
        yaml.safe_dump({"resources": ["all.yaml"], "images": [{"name": pin["name"], "digest": digest} for pin in pins]})
    )
    raw = subprocess.run(
        [tool("kubectl"), "kustomize", str(DEPLOY / "kubernetes" / "base")], capture_output=True, text=True, check=True
    )
    (tmp_path / "all.yaml").write_text(raw.stdout)
    made = subprocess.run(
        [tool("kubectl"), "kustomize", str(tmp_path)], capture_output=True, text=True, check=True
    ).stdout
    images = re.findall(r"(?:image|reference): (\S+)", made)
    assert len(images) == 6
    assert {image.partition("@")[2] for image in images} == {digest}


def test_the_namespace_enforces_it_too() -> None:
    """The cluster's own admission refuses what the tests above would refuse; all objects lie in that namespace."""
    objects = rendered(OVERLAYS[0])
    (namespace,) = [entry for entry in objects if entry["kind"] == "Namespace"]
    assert namespace["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] == "restricted"
    others = [entry for entry in objects if entry["kind"] != "Namespace"]
    assert {entry["metadata"]["namespace"] for entry in others} == {namespace["metadata"]["name"]}


@pytest.mark.parametrize("name", ["serving", "robustness"])
def test_the_operators_rules_are_prometheus_rules(name: str) -> None:
    """One text, two wrappings; `make kubernetes-rules` writes the second, and an overlay brings it."""
    rules = yaml.safe_load((DEPLOY / "prometheus" / "rules" / f"{name}.yaml").read_text())
    assert yaml.safe_load((DEPLOY / "kubernetes" / "base" / f"rules-{name}.yaml").read_text())["spec"] == rules
    assert named(rendered(OVERLAYS[0]), "PrometheusRule", name)["spec"] == rules


def test_grafanas_sidecar_finds_the_dashboards() -> None:
    """All that are committed, byte for byte, by the label that Grafana's chart looks for; small enough to apply."""
    found = named(rendered(OVERLAYS[0]), "ConfigMap", "dashboards")
    assert found["metadata"]["labels"]["grafana_dashboard"] == "1"
    files = {path.name: path.read_text() for path in (DEPLOY / "grafana" / "dashboards").iterdir()}
    assert found["data"] == files
    assert (
        sum(map(len, files.values())) < 250_000
    )  # the annotation of `kubectl apply` repeats it, in 262144 bytes at most
