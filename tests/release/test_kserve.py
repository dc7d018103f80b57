"""`dfmcl promote --print-kserve`: an InferenceService that serves the promoted bytes and no others."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from dfmcl.common.errors import BadInput
from dfmcl.release.kserve import checked_reference
from tests.deploying import MODEL, named, rendered
from tests.signing import code_of

ROOT = Path(__file__).parents[2]
SHIPPED = ROOT / "model_repository" / MODEL
TRUST = str(ROOT / "deploy" / MODEL / "trust.toml")
IMAGE = f"registry.example:5000/team/dfmcl-model@sha256:{'0' * 64}"
SHA256 = json.loads((SHIPPED / "1" / "manifest.json").read_text())["files"]["model.onnx"]


@pytest.fixture(scope="module")
def printed(tmp_path_factory: pytest.TempPathFactory) -> str:
    """What the command prints about the shipped release, promoted anew."""
    home = tmp_path_factory.mktemp("kserve")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        out: list[str] = []
        patch.setattr("dfmcl.cli.release.say_page", out.append)
        version = str(SHIPPED / "1")
        words = ["--repository", "models", "--name", MODEL, "--trust", TRUST, "--print-kserve", IMAGE]
        assert code_of("promote", version, "--evidence", version, *words) == 0
    return "".join(out)


def test_it_is_the_one_that_deploy_has(printed: str) -> None:
    """Field by field deploy/kserve's, but for the pins: the image's, and what the init container lets through."""
    made: dict[str, Any] = yaml.safe_load(printed)
    shipped = named(rendered("kserve"), "InferenceService", MODEL)
    assert made["metadata"]["annotations"].pop("dfmcl.dev/model-sha256") == SHA256
    assert made["metadata"]["annotations"].pop("dfmcl.dev/version") == "1"
    shipped["metadata"].pop("namespace")
    (verify,) = made["spec"]["predictor"]["initContainers"]
    assert verify["command"][-2:] == ["--sha256", SHA256]
    del verify["command"][-2:]
    model, trust = made["spec"]["predictor"]["volumes"]
    assert model["image"]["reference"] == IMAGE
    model["image"]["reference"] = shipped["spec"]["predictor"]["volumes"][0]["image"]["reference"]
    assert shipped["spec"]["predictor"]["volumes"][1]["configMap"]["name"].startswith("trust-")  # kustomize's hash
    shipped["spec"]["predictor"]["volumes"][1] = trust
    assert made == shipped
    runtime = named(rendered("kserve"), "ServingRuntime", "dfmcl-triton")
    assert made["spec"]["predictor"]["model"]["runtime"] == runtime["metadata"]["name"]


def test_its_init_container_serves_the_pinned_bytes_only(printed: str, capsys: pytest.CaptureFixture[str]) -> None:
    """The command as it stands, with its paths here: 0 for the promoted model, 1 for another digest, 2 for none."""
    (verify,) = yaml.safe_load(printed)["spec"]["predictor"]["initContainers"]
    path, trust = str(SHIPPED), TRUST
    words = [{f"/models/{MODEL}": path, "/etc/dfmcl/trust.toml": trust}.get(word, word) for word in verify["command"]]
    assert code_of(*words[1:]) == 0
    capsys.readouterr()
    assert code_of(*words[1:-1], "a" * 64) == 1
    assert f"model.onnx is {SHA256[:12]}..., pinned is aaaaaaaaaaaa" in capsys.readouterr().err
    assert code_of(*words[1:-1], SHA256.upper()) == 2


@pytest.mark.parametrize(
    ("reference", "fits"),
    [
        (IMAGE, True),
        ("dfmcl-model", True),
        ("registry.example/dfmcl-model:resnet18-1", True),
        (f"localhost:5000/m:1@sha256:{'a' * 64}", True),
        ("", False),
        ("Registry/x", False),
        ("x@sha256:abc", False),
        ('x"\n  evil: true', False),
        ("s3://bucket/model", False),
    ],
)
def test_only_an_image_is_printed(reference: str, fits: bool) -> None:
    """Nothing that a YAML reader would take for more than a name."""
    if fits:
        assert checked_reference(reference) == reference
        return
    with pytest.raises(BadInput, match="is no image, such as"):
        checked_reference(reference)


def test_a_wrong_image_promotes_nothing(tmp_path: Path) -> None:
    """Found out before anything is written."""
    version = shutil.copytree(SHIPPED / "1", tmp_path / "v")
    words = ["--repository", str(tmp_path / "models"), "--name", MODEL, "--trust", TRUST, "--print-kserve", "a b"]
    assert code_of("promote", str(version), "--evidence", str(version), *words) == 2
    assert not (tmp_path / "models").exists()
