"""What deploy/ says, as objects: overlays rendered, containers with where they stand, and what is weak about a pod."""

from __future__ import annotations

import copy
import functools
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[1]
DEPLOY = ROOT / "deploy"
MODEL = "resnet18-cifar10"
BUCKET = "kubernetes/overlays/bucket"
OVERLAYS = ("kubernetes/overlays/cpu", "kubernetes/overlays/gpu", "kserve", BUCKET)
JOBS = ("gate/job.yaml", "training/pytorchjob.yaml")
OURS = "dfmcl-"


def tool(name: str) -> str:
    """A program beside our interpreter or on the path; the test is skipped where there is none."""
    found = shutil.which(name, path=str(Path(sys.executable).parent)) or shutil.which(name)
    if found is None:
        pytest.skip(f"{name} is not installed")
    return found


@functools.cache
def _rendered(path: str) -> str:
    command = [tool("kubectl"), "kustomize", str(DEPLOY / path)]
    made = subprocess.run(command, capture_output=True, text=True, check=False)
    assert made.returncode == 0, made.stderr
    return made.stdout


def rendered(path: str) -> list[dict[str, Any]]:
    """An overlay as `kubectl apply -k` would apply it, or a file as it is."""
    text = (DEPLOY / path).read_text(encoding="utf-8") if path.endswith(".yaml") else _rendered(path)
    return [entry for entry in yaml.safe_load_all(text) if entry]


def named(objects: list[dict[str, Any]], kind: str, name: str) -> dict[str, Any]:
    """The one object of that kind and name; generated names end in a hash."""
    (found,) = [
        entry
        for entry in objects
        if entry["kind"] == kind and (entry["metadata"]["name"] == name or _stem(entry) == (kind, name))
    ]
    return found


def _stem(entry: dict[str, Any]) -> tuple[str, str]:
    name = entry["metadata"]["name"]
    return entry["kind"], name.rpartition("-")[0] if entry["kind"] == "ConfigMap" else name


@dataclass(frozen=True)
class Pod:
    """A pod's specification and where it stands."""

    where: str
    spec: dict[str, Any]
    labels: dict[str, str]

    @property
    def containers(self) -> list[dict[str, Any]]:
        return [*self.spec.get("initContainers", []), *self.spec["containers"]]


def pods(objects: list[dict[str, Any]]) -> Iterator[Pod]:
    """Every pod that the objects lead to; KServe's is put together from the runtime and the service, as KServe does."""
    for entry in objects:
        where, spec = f"{entry['kind']} {entry['metadata']['name']}", entry.get("spec", {})
        if entry["kind"] in ("Deployment", "Job"):
            yield Pod(where, spec["template"]["spec"], spec["template"].get("metadata", {}).get("labels", {}))
        elif entry["kind"] == "PyTorchJob":
            for role, replica in spec["pytorchReplicaSpecs"].items():
                yield Pod(f"{where} {role}", replica["template"]["spec"], {})
        elif entry["kind"] == "InferenceService":
            yield Pod(where, _kserve_pod(spec["predictor"], objects), {})


def _kserve_pod(predictor: dict[str, Any], objects: list[dict[str, Any]]) -> dict[str, Any]:
    pod = copy.deepcopy(predictor)
    runtime = named(objects, "ServingRuntime", pod.pop("model")["runtime"])["spec"]
    for key in ("minReplicas", "maxReplicas"):
        del pod[key]
    return {**pod, "containers": runtime["containers"], "volumes": runtime["volumes"] + pod["volumes"]}


def weaknesses(pod: Pod) -> set[str]:
    """What a pod lacks, in a word each."""
    found, context = set(), pod.spec.get("securityContext", {})
    if pod.spec.get("automountServiceAccountToken") is not False:
        found.add("service account token")
    if context.get("runAsNonRoot") is not True or context.get("runAsUser") != 1000:
        found.add("root")
    if context.get("seccompProfile") != {"type": "RuntimeDefault"}:
        found.add("seccomp")
    if any(pod.spec.get(key) for key in ("hostNetwork", "hostPID", "hostIPC")):
        found.add("host")
    if any("hostPath" in volume for volume in pod.spec.get("volumes", [])):
        found.add("host path")
    return found.union(*(_weaknesses(container) for container in pod.containers))


def _weaknesses(container: dict[str, Any]) -> set[str]:
    found, context, resources = set(), container.get("securityContext", {}), container.get("resources", {})
    if context.get("privileged") or context.get("allowPrivilegeEscalation") is not False:
        found.add("escalation")
    if context.get("runAsUser", 1000) != 1000 or context.get("runAsNonRoot", True) is not True:
        found.add("root")
    if context.get("readOnlyRootFilesystem") is not True:
        found.add("writable root")
    if context.get("capabilities") != {"drop": ["ALL"]}:
        found.add("capabilities")
    if not {"cpu", "memory"} <= set(resources.get("requests", {})) or "memory" not in resources.get("limits", {}):
        found.add("resources")
    reference = str(container["image"]).rpartition("/")[2]
    if ":" not in reference or reference.endswith(":latest"):
        found.add("latest")
    words = [*container.get("command", []), *container.get("args", [])]
    values = [entry.get("value", "") for entry in container.get("env", []) if "TOKEN" in entry["name"]]
    if any("token=" in word and not word.endswith("=$(ADMIN_TOKEN)") for word in words) or any(values):
        found.add("literal secret")
    return found
