"""The chart: rendered by Helm's own engine to the objects of the kustomize manifests, but for what is listed here."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from tests.deploying import DEPLOY, MODEL, named, pods, rendered, weaknesses
from tests.test_deploy_kubernetes import CUSTOM, KUBERNETES

helm = pytest.importorskip("helm_python.chart", reason="helm-python-sdk renders the chart")

CHART = DEPLOY / "helm"
OWN = DEPLOY / MODEL
TRUST = {name: (OWN / name).read_text() for name in ("trust.toml", "release.pub", "gate.toml")}
VALUES: dict[str, Any] = {
    "trust": {"files": TRUST},
    "gateway": {"config": (OWN / "gateway.toml").read_text()},
    "watch": {"config": (OWN / "watch.toml").read_text()},
}


def merged(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    found = dict(base)
    for key, value in changes.items():
        found[key] = (
            merged(found[key], value) if isinstance(value, dict) and isinstance(found.get(key), dict) else value
        )
    return found


def chart(**changes: Any) -> list[dict[str, Any]]:
    """What `helm install dfmcl deploy/helm --namespace dfmcl` would apply with these values."""
    made = helm.Chart.load(CHART).render(merged(VALUES, changes), name="dfmcl", namespace="dfmcl")
    texts = [text for path, text in made.items() if path.endswith(".yaml")]
    return [entry for text in texts for entry in yaml.safe_load_all(text) if entry]


def by_name(objects: list[dict[str, Any]]) -> dict[tuple[str, str], dict[str, Any]]:
    found = {(entry["kind"], entry["metadata"]["name"]): entry for entry in objects}
    assert len(found) == len(objects)
    return found


def as_chart(objects: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Kustomize's objects less the differences: the namespace, which Helm makes by --create-namespace, and the hash in
    the names of ConfigMaps, in whose place the chart's pods carry one as an annotation."""
    kept = [entry for entry in objects if entry["kind"] != "Namespace"]
    text = json.dumps(kept)
    for name in ("trust", "gateway", "watch"):
        text = re.sub(rf'"{name}-[a-z0-9]{{10}}"', f'"{name}"', text)
    return json.loads(text)


def as_kustomize(objects: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The chart's objects less the annotation, which is there where a file is mounted."""
    found = copy.deepcopy(objects)
    for entry in found:
        if entry["kind"] == "Deployment":
            annotations = entry["spec"]["template"]["metadata"].pop("annotations")
            assert re.fullmatch("[0-9a-f]{64}", annotations["checksum/config"])
    return found


@pytest.mark.parametrize(("overlay", "case"), [("cpu", "cpu"), ("gpu", "gpu"), ("bucket", "bucket")])
def test_the_chart_is_the_manifests(overlay: str, case: str) -> None:
    """Object by object and field by field, because the docs speak of both."""
    wanted = by_name(as_chart(rendered(f"kubernetes/overlays/{overlay}")))
    made = by_name(as_kustomize(chart(**CASES[case])))
    assert made.keys() == wanted.keys()
    for key in wanted:
        assert made[key] == wanted[key], key


CASES: dict[str, dict[str, Any]] = {
    "cpu": {},
    "gpu": {"gpu": {"enabled": True}},
    "existing Triton": {
        "triton": {"enabled": False},
        "network": {"triton": {"to": [{"ipBlock": {"cidr": "10.0.0.0/24"}}], "port": 8001}},
    },
    "claim": {"model": {"volume": {"persistentVolumeClaim": {"claimName": "models", "readOnly": True}}}},
    "driver": {"model": {"volume": {"csi": {"driver": "s3.csi.aws.com", "readOnly": True}}}},
    "bucket": {"model": {"bucket": {"repository": "s3://releases/models"}}},
    "bucket by a role": {
        "model": {
            "bucket": {
                "repository": "s3://releases/models",
                "secret": "",
                "serviceAccount": "reader",
                "environment": {"AWS_REGION": "eu-central-1"},
            }
        },
        "gpu": {"enabled": True},
        "network": {"bucket": {"to": [{"ipBlock": {"cidr": "10.1.0.0/24"}}], "port": 9000}},
    },
    "pinned": {"model": {"sha256": "a" * 64}},
    "bare": {
        "gateway": {"enabled": False},
        "watch": {"enabled": False},
        "network": {"enabled": False},
        "monitoring": {"podMonitors": False, "rules": False, "dashboards": False},
    },
}


@pytest.mark.parametrize("case", CASES)
def test_every_choice_is_valid_and_hardened(case: str) -> None:
    """Strictly by Kubernetes' schemas, pods hardened, each mount with its volume, all in the release's namespace."""
    objects = chart(**CASES[case])
    for entry in objects:
        assert entry["metadata"]["namespace"] == "dfmcl"
        if entry["kind"] not in CUSTOM:
            kubernetes_validate.validate(entry, KUBERNETES, strict=True)
    assert {pod.where: weaknesses(pod) for pod in pods(objects) if weaknesses(pod)} == {}
    for pod in pods(objects):
        volumes = {volume["name"] for volume in pod.spec["volumes"]}
        assert all(mount["name"] in volumes for container in pod.containers for mount in container["volumeMounts"])


def test_choices_choose() -> None:
    """What is switched off is gone, what is named is there, and only where it belongs."""
    bare = by_name(chart(**CASES["bare"]))
    assert {kind for kind, _ in bare} == {
        "ConfigMap", "Deployment", "HorizontalPodAutoscaler", "PodDisruptionBudget", "Service",
    }  # fmt: skip
    assert {name for _, name in bare} == {"triton", "trust"}
    existing = by_name(chart(**CASES["existing Triton"]))
    assert not {key for key in existing if key[1] in ("triton", "trust")}
    egress = existing["NetworkPolicy", "to-triton"]["spec"]["egress"][0]
    assert egress == {"to": [{"ipBlock": {"cidr": "10.0.0.0/24"}}], "ports": [{"port": 8001}]}
    for case in ("claim", "driver"):
        found = by_name(chart(**CASES[case]))
        for name in ("triton", "watch"):
            (volume,) = [
                one
                for one in found["Deployment", name]["spec"]["template"]["spec"]["volumes"]
                if one["name"] == "model"
            ]
            assert volume == {"name": "model", **CASES[case]["model"]["volume"]}
    role = by_name(chart(**CASES["bucket by a role"]))
    for name in ("triton", "watch"):
        pod = role["Deployment", name]["spec"]["template"]["spec"]
        readers = [one for one in (*pod.get("initContainers", []), *pod["containers"]) if one["command"][0] == "dfmcl"]
        assert pod["serviceAccountName"] == "reader"
        assert [one["env"] for one in readers] == [[{"name": "AWS_REGION", "value": "eu-central-1"}]] * len(readers)
        assert not any("envFrom" in one for one in readers)
    assert role["NetworkPolicy", "to-bucket"]["spec"]["egress"][0] == {
        "to": [{"ipBlock": {"cidr": "10.1.0.0/24"}}],
        "ports": [{"port": 9000}],
    }
    (served,) = role["Deployment", "triton"]["spec"]["template"]["spec"]["containers"]
    assert "--model-config-name=gpu" in served["args"]
    (verify,) = named(chart(**CASES["pinned"]), "Deployment", "triton")["spec"]["template"]["spec"]["initContainers"]
    assert verify["command"][-2:] == ["--sha256", "a" * 64]
    other = named(chart(model={"name": "digits"}), "Deployment", "triton")["spec"]["template"]["spec"]
    for container in (*other["initContainers"], *other["containers"]):
        (mount,) = [one for one in container["volumeMounts"] if one["name"] == "model"]
        assert (mount["mountPath"], mount["subPath"]) == ("/models/digits", "digits")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"trust": {"files": None}}, "trust.files: give trust.toml"),
        ({"trust": {"files": {"trust.toml": None}}}, "/trust/files/trust.toml"),
        ({"gateway": {"config": ""}}, "gateway.config: give the text of gateway.toml"),
        ({"watch": {"config": ""}}, "watch.config: give the text of watch.toml"),
        ({"model": {"image": ""}}, "model.image: name the OCI image of the model, or model.volume"),
        ({"modle": {"name": "x"}}, "modle"),
        ({"gpu": {"enable": True}}, "enable"),
        ({"model": {"sha256": "abc"}}, "sha256"),
        ({"model": {"sha256": "a" * 64, "bucket": {"repository": "s3://b/m"}}}, "a bucket is followed; leave one"),
        ({"model": {"bucket": {"repository": "gs://b/m"}}}, "repository"),
        ({"model": {"name": "../x"}}, "name"),
        ({"triton": {"replicas": {"min": 0}}}, "min"),
    ],
)
def test_a_chart_that_would_verify_nothing_is_not_rendered(changes: dict[str, Any], message: str) -> None:
    """What is missing is said before a pod hangs; a misspelt value is an error, not a default."""
    with pytest.raises(Exception, match=re.escape(message)):
        chart(**changes)


def test_a_changed_file_is_a_rollout() -> None:
    """The annotation of a pod changes with its mounts, and with nothing else."""

    def sums(**changes: Any) -> dict[str, str]:
        return {
            entry["metadata"]["name"]: entry["spec"]["template"]["metadata"]["annotations"]["checksum/config"]
            for entry in chart(**changes)
            if entry["kind"] == "Deployment"
        }

    before = sums()
    assert sums(images={"serve": "dfmcl-serve:2"}) == before
    changed = {
        "triton": sums(trust={"files": {**TRUST, "gate.toml": "x"}}),
        "gateway": sums(gateway={"config": "x"}),
        "watch": sums(watch={"config": "x"}),
    }
    assert {name: {key for key in before if after[key] != before[key]} for name, after in changed.items()} == {
        "triton": {"triton", "watch"},
        "gateway": {"gateway"},
        "watch": {"watch"},
    }


@pytest.mark.parametrize("case", CASES)
def test_the_chart_lints(case: str) -> None:
    """Helm's own lint, strictly."""
    report = helm.lint(CHART, merged(VALUES, CASES[case]), strict=True, namespace="dfmcl")
    assert [one for one in report["messages"] if one["severity"] > 1] == [] == report["errors"]


def test_a_package_holds_rules_and_dashboards(tmp_path: Path) -> None:
    """The chart has links to the one copy of each; what `helm package` writes has the files."""
    archive = helm.Chart.load(CHART).save(tmp_path)
    found = helm.Chart.load(archive).render(VALUES, name="dfmcl", namespace="dfmcl")
    assert found == helm.Chart.load(CHART).render(VALUES, name="dfmcl", namespace="dfmcl")
    assert "RobustnessLost" in found["dfmcl/templates/monitoring.yaml"]
