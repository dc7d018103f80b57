"""Policies that refuse a model without our verdict: their CEL, evaluated on the manifests' pods and on spoilt ones."""

from __future__ import annotations

import copy
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


def refused(policy: str, spec: dict[str, Any]) -> list[str]:
    """The messages of the expressions that a pod does not meet, each evaluated by a CEL that is not Kubernetes' own."""
    variables, validations = POLICIES[policy]
    environment, known = celpy.Environment(), celpy.celtypes.MapType()
    about = {"object": celpy.json_to_cel({"apiVersion": "v1", "kind": "Pod", "spec": spec}), "variables": known}

    def value(expression: str) -> Any:
        return environment.program(environment.compile(expression)).evaluate(about)

    for variable in variables:
        known[celpy.celtypes.StringType(variable["name"])] = value(variable["expression"])
    return [one["message"] for one in validations if not value(one["expression"])]


PODS = {
    f"{overlay} {pod.where}": pod.spec for overlay in OVERLAYS if overlay != BUCKET for pod in pods(rendered(overlay))
}


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("pod", PODS)
def test_what_deploy_runs_is_let_in(policy: str, pod: str) -> None:
    """Triton behind its init container, also KServe's; the gateway; the watch, which verifies by itself."""
    assert refused(policy, PODS[pod]) == []


@pytest.mark.parametrize("policy", POLICIES)
def test_what_follows_a_bucket_is_kept_out(policy: str) -> None:
    """Triton's pod alone: admission cannot tell that a directory which changes holds what was verified."""
    found = {pod.where: refused(policy, pod.spec) for pod in pods(rendered(BUCKET))}
    assert found.pop("Deployment triton") == [READ_ONLY, NOT_VERIFIED]
    assert set(map(tuple, found.values())) == {()}


def serving() -> dict[str, Any]:
    return copy.deepcopy(next(spec for name, spec in PODS.items() if "cpu" in name and name.endswith("triton")))


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
    volume.pop("image")
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


def debug(spec: dict[str, Any]) -> None:
    mount = {"name": "model", "mountPath": "/x"}
    spec["ephemeralContainers"] = [{"name": "debug", "image": "busybox", "volumeMounts": [mount]}]


READ_ONLY, NOT_VERIFIED, REPOSITORY, DEBUG = (one["message"] for one in POLICIES["Kyverno"][1])
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
    "the server in the name of dfmcl": (
        lambda spec: (without_verify(spec), spec["containers"][0].update(image="dfmcl-serve:1", command=["sh"])),
        NOT_VERIFIED,
    ),
}


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("how", SPOILT)
def test_what_was_not_verified_is_kept_out(policy: str, how: str) -> None:
    """Each way around the proof is refused, for its reason."""
    spoil, message = SPOILT[how]
    spec = serving()
    assert refused(policy, spec) == []
    spoil(spec)
    assert message in refused(policy, spec)


def test_a_read_only_claim_and_a_pinned_digest_are_let_in() -> None:
    """A volume in place of an image, and `--sha256` of the one model that may be served."""
    spec = serving()
    claim(spec, readOnly=True)
    spec["initContainers"][0]["command"] += ["--sha256", "a" * 64]
    assert [refused(policy, spec) for policy in POLICIES] == [[], []]


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
    assert (rule["resources"], by_kyverno["resources"]["kinds"]) == (["pods"], ["Pod"])
    assert all(re.search(r"[a-z]", one["message"]) for one in policy["spec"]["validations"])
