"""Policies that refuse a model without our verdict: their CEL, evaluated on the manifests' pods and on spoilt ones."""

from __future__ import annotations

import copy
import functools
import re
from collections.abc import Callable
from typing import Any

import kubernetes_validate
import pytest
import yaml

from tests.deploying import BUCKET, DEPLOY, OVERLAYS, pods, rendered
from tests.test_deploy_kubernetes import KUBERNETES

celpy = pytest.importorskip("celpy", reason="cel-python evaluates the policies")

NATIVE = list(yaml.safe_load_all((DEPLOY / "admission" / "validating-admission-policy.yaml").read_text()))
KYVERNO = yaml.safe_load((DEPLOY / "admission" / "kyverno.yaml").read_text())
POLICIES: dict[str, tuple[list[dict[str, str]], list[dict[str, str]]]] = {
    "ValidatingAdmissionPolicy": (NATIVE[0]["spec"]["variables"], NATIVE[0]["spec"]["validations"]),
    "Kyverno": (
        (cel := KYVERNO["spec"]["rules"][0]["validate"]["cel"])["variables"],
        cel["expressions"],
    ),
}


@functools.cache
def program(expression: str) -> Any:
    """A CEL that is not Kubernetes' own."""
    environment = celpy.Environment()
    return environment.program(environment.compile(expression))


def refused(spec: dict[str, Any]) -> list[str]:
    """The messages of the expressions that a pod does not meet, of both policies, because they are the same."""
    variables, validations = POLICIES["ValidatingAdmissionPolicy"]
    known = celpy.celtypes.MapType()
    about = {"object": celpy.json_to_cel({"apiVersion": "v1", "kind": "Pod", "spec": spec}), "variables": known}
    for variable in variables:
        known[celpy.celtypes.StringType(variable["name"])] = program(variable["expression"]).evaluate(about)
    return [one["message"] for one in validations if not program(one["expression"]).evaluate(about)]


PODS = {f"{overlay} {pod.where}": pod.spec for overlay in OVERLAYS for pod in pods(rendered(overlay))}


@pytest.mark.parametrize("pod", PODS)
def test_what_deploy_runs_is_let_in(pod: str) -> None:
    """Triton behind what verifies or syncs, also KServe's; the gateway; the watch, which verifies by itself."""
    assert refused(PODS[pod]) == []


def serving(overlay: str = "cpu") -> dict[str, Any]:
    return copy.deepcopy(next(spec for name, spec in PODS.items() if overlay in name and name.endswith("triton")))


def without_verify(spec: dict[str, Any]) -> None:
    spec.pop("initContainers")


def verify(spec: dict[str, Any], **parts: Any) -> None:
    spec["initContainers"][0].update(parts)


def words(spec: dict[str, Any], place: int, word: str) -> None:
    spec["initContainers"][0]["command"][place] = word


def another_volume(spec: dict[str, Any]) -> None:
    """What is verified is one volume, what is served another."""
    spec["volumes"].append({"name": "other", "image": {"reference": "evil/model@sha256:00"}})
    spec["containers"][0]["volumeMounts"][0]["name"] = "other"


def scratch(spec: dict[str, Any]) -> None:
    """What can be written after it was verified."""
    volume = next(one for one in spec["volumes"] if one["name"] == "model")
    volume.pop("image")
    volume["emptyDir"] = {}


def claim(spec: dict[str, Any], **parts: Any) -> None:
    volume = next(one for one in spec["volumes"] if one["name"] == "model")
    volume.pop("image", volume.pop("emptyDir", None))
    volume["persistentVolumeClaim"] = {"claimName": "models", **parts}


def beside(spec: dict[str, Any]) -> None:
    """A second model below the repository that Triton loads, which nobody verified."""
    spec["volumes"].append({"name": "other", "image": {"reference": "evil/model"}})
    mount = {"name": "other", "mountPath": "/models/other", "readOnly": True}
    spec["containers"][0]["volumeMounts"].append(mount)


def elsewhere(spec: dict[str, Any], name: str, path: str) -> None:
    spec["volumes"].append({"name": "other", name: {} if name == "emptyDir" else {"reference": "evil/model"}})
    mount = {"name": "other", "mountPath": path, "readOnly": True}
    spec["containers"][0]["volumeMounts"].append(mount)


def one_more(spec: dict[str, Any]) -> None:
    """A container of a stranger's that serves the same volume's unverified part."""
    second = copy.deepcopy(spec["containers"][0])
    second["name"] = "second"
    second["volumeMounts"][0]["subPath"] = "another"
    spec["containers"].append(second)


def over(spec: dict[str, Any], path: str, **volume: Any) -> None:
    """One more volume in the container that verifies or syncs; one before it may have filled it."""
    spec["volumes"].append({"name": "over", **(volume or {"emptyDir": {}})})
    spec["initContainers"][0]["volumeMounts"].append({"name": "over", "mountPath": path})


def over_server(spec: dict[str, Any], command: list[str], path: str = "") -> None:
    """The server's container as dfmcl's own, with one more volume over a path."""
    spec["volumes"] += [{"name": "over", "emptyDir": {}}, {"name": "config", "configMap": {"name": "watch"}}]
    mounts = [{"name": "config", "mountPath": "/etc/dfmcl"}, *([{"name": "over", "mountPath": path}] if path else [])]
    model = spec["containers"][0]["volumeMounts"][:1]
    spec["containers"][0] = {"name": "x", "image": "dfmcl-watch:1", "command": command, "volumeMounts": model + mounts}


def beside_the_sync(spec: dict[str, Any], **parts: Any) -> None:
    """A container that writes where Triton reads."""
    mount = {"name": "model", "mountPath": "/models", **parts}
    spec["containers"].append({"name": "beside", "image": "evil/x", "volumeMounts": [mount]})


def debug(spec: dict[str, Any]) -> None:
    mount = {"name": "model", "mountPath": "/x"}
    spec["ephemeralContainers"] = [{"name": "debug", "image": "busybox", "volumeMounts": [mount]}]


PLAIN, READ_ONLY, NOT_VERIFIED, EARLY, SHARED, REPOSITORY, DEBUG = (one["message"] for one in POLICIES["Kyverno"][1])
SPOILT: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "no init container": (without_verify, NOT_VERIFIED),
    "an init container of another image": (lambda spec: verify(spec, image="busybox:1"), NOT_VERIFIED),
    "an image that only ends alike": (lambda spec: verify(spec, image="evil/not-dfmcl-serve"), NOT_VERIFIED),
    "another subcommand": (lambda spec: words(spec, 1, "status"), NOT_VERIFIED),
    "another program": (lambda spec: words(spec, 0, "true"), NOT_VERIFIED),
    "another path": (lambda spec: words(spec, 2, "/models"), NOT_VERIFIED),
    "another option": (lambda spec: words(spec, 3, "--evidence"), NOT_VERIFIED),
    "a trust file of the image's": (lambda spec: words(spec, 4, "/models/resnet18-cifar10/trust.toml"), NOT_VERIFIED),
    "arguments after the command": (lambda spec: verify(spec, args=["--at", "2020-01-01"]), NOT_VERIFIED),
    "one word more": (lambda spec: spec["initContainers"][0]["command"].append("--help"), NOT_VERIFIED),
    "two words more": (
        lambda spec: spec["initContainers"][0]["command"].extend(["--at", "2020-01-01"]),
        NOT_VERIFIED,
    ),
    "a sidecar, for which nobody waits": (lambda spec: verify(spec, restartPolicy="Always"), NOT_VERIFIED),
    "another part of the volume": (
        lambda spec: spec["initContainers"][0]["volumeMounts"][0].update(subPath="good"),
        NOT_VERIFIED,
    ),
    "another volume": (another_volume, NOT_VERIFIED),
    "a second model": (beside, NOT_VERIFIED),
    "a second server": (one_more, NOT_VERIFIED),
    "an image volume at another path": (lambda spec: elsewhere(spec, "image", "/data"), NOT_VERIFIED),
    "what KServe fetched": (lambda spec: elsewhere(spec, "emptyDir", "/mnt/models"), READ_ONLY),
    "an empty directory": (scratch, READ_ONLY),
    "a claim that can be written": (claim, READ_ONLY),
    "a mount that can be written": (
        lambda spec: spec["containers"][0]["volumeMounts"][0].pop("readOnly"),
        READ_ONLY,
    ),
    "another repository": (lambda spec: spec["containers"][0]["args"].append("--model-repository=/tmp"), REPOSITORY),
    "another repository, in two words": (
        lambda spec: spec["containers"][0]["command"].extend(["--model-repository", "/tmp"]),
        REPOSITORY,
    ),
    "a debugging container": (debug, DEBUG),
    "a trust file out of the ConfigMap": (
        lambda spec: words(spec, 4, "/etc/dfmcl/../../models/evil.toml"),
        NOT_VERIFIED,
    ),
    "another program at dfmcl's place": (lambda spec: over(spec, "/usr/local/bin"), NOT_VERIFIED),
    "another program, from a ConfigMap": (
        lambda spec: over(spec, "/usr/local/bin", configMap={"name": "evil"}),
        NOT_VERIFIED,
    ),
    "a file over the trust file": (lambda spec: over(spec, "/etc/dfmcl/trust.toml"), NOT_VERIFIED),
    "a good model over the one that is mounted": (
        lambda spec: over(spec, "/models/resnet18-cifar10/1", image={"reference": "good/model"}),
        NOT_VERIFIED,
    ),
    "a good model at the same path, written otherwise": (
        lambda spec: over(spec, "/models/resnet18-cifar10/", image={"reference": "good/model"}),
        NOT_VERIFIED,
    ),
    "a variable that loads code": (
        lambda spec: verify(spec, env=[{"name": "PYTHONPATH", "value": "/models/resnet18-cifar10"}]),
        NOT_VERIFIED,
    ),
    "a variable that names a program": (
        lambda spec: verify(spec, env=[{"name": "AWS_CONFIG_FILE", "value": "/tmp/config"}]),
        NOT_VERIFIED,
    ),
    "variables with a beginning": (
        lambda spec: verify(spec, envFrom=[{"prefix": "PYTHON", "secretRef": {"name": "any"}}]),
        NOT_VERIFIED,
    ),
    "variables of a ConfigMap": (lambda spec: verify(spec, envFrom=[{"configMapRef": {"name": "any"}}]), NOT_VERIFIED),
    "a part of the volume that a variable names": (
        lambda spec: spec["containers"][0]["volumeMounts"][0].update(subPathExpr="another"),
        PLAIN,
    ),
    "a dot in the path": (lambda spec: elsewhere(spec, "emptyDir", "/./models"), PLAIN),
    "two dots in the path": (lambda spec: elsewhere(spec, "emptyDir", "/mnt/../models"), PLAIN),
    "two slashes in the path": (lambda spec: elsewhere(spec, "emptyDir", "/mnt//models"), PLAIN),
    "a slash at the path's end": (lambda spec: elsewhere(spec, "emptyDir", "/mnt/models/"), READ_ONLY),
    "a line's end in the path": (lambda spec: elsewhere(spec, "emptyDir", "/models/a\nb"), READ_ONLY),
    "a token's folder that is a program's": (
        lambda spec: over(spec, "/var/run/secrets/../../../usr/local/bin", projected={"sources": []}),
        NOT_VERIFIED,
    ),
    "a hook in the verifier": (lambda spec: verify(spec, lifecycle={"postStart": {"exec": {}}}), NOT_VERIFIED),
    "a probe in the verifier": (lambda spec: verify(spec, startupProbe={"exec": {"command": ["sh"]}}), NOT_VERIFIED),
    "a server before the verifier": (
        lambda spec: spec["initContainers"].insert(
            0, {**copy.deepcopy(spec["containers"][0]), "restartPolicy": "Always"}
        ),
        EARLY,
    ),
    "a claim that is mounted twice": (
        lambda spec: (
            claim(spec, readOnly=True),
            spec["volumes"].append({"name": "again", "persistentVolumeClaim": {"claimName": "models"}}),
        ),
        READ_ONLY,
    ),
    "a watch that is something else": (
        lambda spec: (
            without_verify(spec),
            over_server(spec, ["dfmcl", "watch", "--config", "/etc/dfmcl/watch.toml"], "/usr/local/bin"),
        ),
        NOT_VERIFIED,
    ),
    "a watch whose config is the model's": (
        lambda spec: (without_verify(spec), over_server(spec, ["dfmcl", "watch", "--config", "/models/watch.toml"])),
        NOT_VERIFIED,
    ),
    "shared processes": (lambda spec: spec.update(shareProcessNamespace=True), SHARED),
    "the host's processes": (lambda spec: spec.update(hostPID=True), SHARED),
    "the folder above": (lambda spec: elsewhere(spec, "emptyDir", "/mnt"), READ_ONLY),
    "the server in the name of dfmcl": (
        lambda spec: (without_verify(spec), spec["containers"][0].update(image="dfmcl-serve:1", command=["sh"])),
        NOT_VERIFIED,
    ),
}


@pytest.mark.parametrize("how", SPOILT)
def test_what_was_not_verified_is_kept_out(how: str) -> None:
    """Each way around the proof is refused, for its reason."""
    spoil, message = SPOILT[how]
    spec = serving()
    assert refused(spec) == []
    spoil(spec)
    assert message in refused(spec)


# Ways around the sync of a pod that follows a bucket.
UNSYNCED: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "no sync": (without_verify, READ_ONLY),
    "no sync before the server": (lambda spec: spec["initContainers"].pop(0), READ_ONLY),
    "a sync for which nobody waits": (lambda spec: verify(spec, restartPolicy="Always"), READ_ONLY),
    "a sync that does not end": (lambda spec: spec["initContainers"][0]["command"].pop(), READ_ONLY),
    "a sync of another image": (lambda spec: verify(spec, image="busybox:1"), READ_ONLY),
    "a sync with other words": (lambda spec: words(spec, 1, "pull"), READ_ONLY),
    "a sync elsewhere": (lambda spec: words(spec, 5, "/tmp"), READ_ONLY),
    "a sync into a part": (lambda spec: words(spec, 5, "/models/good"), READ_ONLY),
    "a sync that trusts a file of the bucket's": (lambda spec: words(spec, 7, "/models/trust.toml"), READ_ONLY),
    "a follower that trusts another file": (
        lambda spec: spec["initContainers"][1]["command"].__setitem__(7, "/tmp/trust.toml"),
        READ_ONLY,
    ),
    "a follower without trust": (
        lambda spec: spec["initContainers"][1].update(command=spec["initContainers"][1]["command"][:6]),
        READ_ONLY,
    ),
    "another program at dfmcl's place": (lambda spec: over(spec, "/usr/local/bin"), READ_ONLY),
    "a variable that loads code": (lambda spec: verify(spec, env=[{"name": "PYTHONPATH", "value": "/tmp"}]), READ_ONLY),
    "temporary files where Triton reads": (
        lambda spec: spec["initContainers"][0]["volumeMounts"][2].update(name="model"),
        READ_ONLY,
    ),
    "a writer beside it": (beside_the_sync, READ_ONLY),
    "a writer before it": (
        lambda spec: spec["initContainers"].insert(
            0, {"name": "before", "image": "evil/x", "volumeMounts": [{"name": "model", "mountPath": "/x"}]}
        ),
        READ_ONLY,
    ),
    "a claim, which others may write": (claim, READ_ONLY),
    "a mount that can be written": (
        lambda spec: spec["containers"][0]["volumeMounts"][0].pop("readOnly"),
        READ_ONLY,
    ),
    "a part of the copy": (
        lambda spec: spec["containers"][0]["volumeMounts"][0].update(subPath="digits"),
        NOT_VERIFIED,
    ),
    "a second model": (beside, NOT_VERIFIED),
    "a debugging container": (debug, DEBUG),
    "a hook in the follower": (
        lambda spec: spec["initContainers"][1].update(lifecycle={"postStart": {"exec": {"command": ["sh"]}}}),
        READ_ONLY,
    ),
    "a probe in the follower": (
        lambda spec: spec["initContainers"][1].update(livenessProbe={"exec": {"command": ["sh"]}}),
        READ_ONLY,
    ),
    "shared processes": (lambda spec: spec.update(shareProcessNamespace=True), SHARED),
}


@pytest.mark.parametrize("how", UNSYNCED)
def test_what_was_not_synced_is_kept_out(how: str) -> None:
    """Each way into the directory that Triton reads but `dfmcl sync` is refused."""
    spoil, message = UNSYNCED[how]
    spec = serving(BUCKET)
    assert refused(spec) == []
    spoil(spec)
    assert message in refused(spec)


@pytest.mark.parametrize("overlay", ["cpu", BUCKET])
def test_what_a_cloud_adds_is_let_in(overlay: str) -> None:
    """A pod's identity: variables and a token in each container, which its webhook adds before this policy looks."""
    spec = serving(overlay)
    spec["volumes"].append({"name": "token", "projected": {"sources": []}})
    for container in spec["containers"] + spec["initContainers"]:
        container.setdefault("env", []).append({"name": "AWS_ROLE_ARN", "value": "arn:aws:iam::1:role/x"})
        mount = {"name": "token", "mountPath": "/var/run/secrets/eks.amazonaws.com/serviceaccount", "readOnly": True}
        container["volumeMounts"].append(mount)
    assert refused(spec) == []


def test_what_has_no_model_is_let_in() -> None:
    """A slash at a path's end, a part of a volume by a variable, a proxy: charts of others have them."""
    mounts = [
        {"name": "init", "mountPath": "/docker-entrypoint-initdb.d/"},
        {"name": "logs", "mountPath": "/logs", "subPathExpr": "$(POD)"},
    ]
    volumes: list[dict[str, Any]] = [{"name": "init", "emptyDir": {}}, {"name": "logs", "emptyDir": {}}]
    container = {"name": "postgres", "image": "postgres:17", "volumeMounts": mounts}
    assert refused({"containers": [container], "volumes": volumes, "shareProcessNamespace": True}) == []
    spec = serving()
    verify(spec, env=[{"name": "HTTP_PROXY", "value": "http://proxy"}])
    assert refused(spec) == []


def test_a_read_only_claim_and_a_pinned_digest_are_let_in() -> None:
    """A volume in place of an image, and `--sha256` of the one model that may be served."""
    spec = serving()
    claim(spec, readOnly=True)
    spec["initContainers"][0]["command"] += ["--sha256", "a" * 64]
    assert refused(spec) == []


def test_the_two_policies_are_one() -> None:
    """Expression for expression; Kubernetes' schema takes its own, and both bind to the same label and operations."""
    assert POLICIES["ValidatingAdmissionPolicy"] == POLICIES["Kyverno"]
    for entry in NATIVE:
        kubernetes_validate.validate(entry, KUBERNETES, strict=True)
    policy, binding = NATIVE
    (by_kyverno,) = KYVERNO["spec"]["rules"][0]["match"]["any"]
    assert binding["spec"]["policyName"] == policy["metadata"]["name"] == KYVERNO["metadata"]["name"]
    assert binding["spec"]["validationActions"] == ["Deny"]
    assert KYVERNO["spec"]["rules"][0]["validate"]["failureAction"] == "Enforce"
    assert policy["spec"]["failurePolicy"] == "Fail"
    labels = binding["spec"]["matchResources"]["namespaceSelector"]["matchLabels"]
    assert by_kyverno["resources"]["namespaceSelector"]["matchLabels"] == labels
    (rule,) = policy["spec"]["matchConstraints"]["resourceRules"]
    assert by_kyverno["resources"]["operations"] == rule["operations"] == ["CREATE", "UPDATE"]
    assert (rule["resources"], by_kyverno["resources"]["kinds"]) == (["pods", "pods/ephemeralcontainers"], ["Pod"])
    assert all(re.search(r"[a-z]", one["message"]) for one in policy["spec"]["validations"])
