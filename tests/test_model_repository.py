"""The model that comes with the project: whole, small, as its records say, and answering as the gate saw it answer."""

from __future__ import annotations

import tomllib
from pathlib import Path

import numpy as np
import onnxruntime
import pytest

from dfmcl.gating.signing.evidence import read_report
from dfmcl.gating.signing.probes_file import read_probes
from dfmcl.gating.signing.trust import load_trust
from dfmcl.release.stores.directory import Directory
from dfmcl.release.verification import verify_release
from dfmcl.robustness.attacks.transfer import ensemble_sha256
from dfmcl.robustness.runs import load_run
from dfmcl.robustness.statistics import clopper_pearson

REPOSITORY = Path(__file__).parents[1] / "model_repository"
TRUST = Path(__file__).parents[1] / "deploy"
MODELS = sorted(path.parent.name for path in REPOSITORY.glob("*/config.pbtxt"))


def test_there_is_a_model() -> None:
    """The tests below are about something."""
    assert MODELS == ["resnet18-cifar10"]


@pytest.mark.parametrize("name", MODELS)
def test_release_holds_and_is_small(name: str) -> None:
    """Signature, verdict, digests and card fit; the ONNX file is under 24 MB, surrogates under 6; no local path."""
    release = verify_release(Directory(REPOSITORY), name, load_trust(TRUST / name / "trust.toml"))
    assert release.sha256 in (REPOSITORY / name / "README.md").read_text()
    assert (release.path / "model.onnx").stat().st_size < 24e6
    surrogates = sorted((REPOSITORY / name / "surrogates").iterdir())
    assert sum(path.stat().st_size for folder in surrogates for path in folder.iterdir()) < 6e6
    assert len([load_run(folder) for folder in surrogates]) >= 3
    texts = [path for path in (REPOSITORY / name).rglob("*") if path.suffix in (".json", ".md", ".pbtxt", ".txt")]
    assert not [path for path in texts if "/tmp/" in path.read_text() or "/home/" in path.read_text()]


@pytest.mark.parametrize("name", MODELS)
def test_the_sidecar_is_compared_with_what_the_gate_recorded(name: str) -> None:
    """The shipped watch's surrogates, all together, are those from which the gate recorded what transfers."""
    watch = tomllib.loads((TRUST / name / "watch.toml").read_text())
    folders = [REPOSITORY / Path(run).relative_to("/models") for run in watch["surrogates"]["runs"]]
    assert folders == sorted((REPOSITORY / name / "surrogates").iterdir())
    digest = ensemble_sha256([load_run(folder).origin_sha256 for folder in folders])
    policy = tomllib.loads((TRUST / name / "gate.toml").read_text())
    report, _ = read_report(verify_release(Directory(REPOSITORY), name).path / "report.json")
    (recorded,) = (entry for entry in report.transfer if entry.about.surrogate_sha256 == digest)
    assert [attack.name for attack in recorded.attacks] == policy["attacks"]["transfer"]
    assert recorded.images == policy["attacks"]["transfer_images"]


@pytest.mark.parametrize("name", MODELS)
def test_model_answers_as_the_gate_recorded(name: str) -> None:
    """ONNX Runtime on the release's probes: the recorded labels, and the accuracies of report and card."""
    folder = verify_release(Directory(REPOSITORY), name).path
    session = onnxruntime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
    probes, report = read_probes(folder / "probes.npz"), read_report(folder / "report.json")[0]
    figures = {}
    for kind, images in (("clean", probes["images"]), ("adversarial", probes["adversarial"])):
        (logits,) = session.run(["logits"], {"images": images[:200]})
        recorded = probes[f"{kind}_logits"][:200]
        assert np.abs(logits - recorded).max() < 1e-2
        figures[kind] = int((probes[f"{kind}_logits"].argmax(axis=1) == probes["labels"]).sum())
    assert figures["clean"] == report.evaluation.clean.k
    distance = np.abs(probes["images"].astype(int) - probes["adversarial"].astype(int)).max()
    assert distance == 8  # of 255: the radius, as bytes
    robust = report.evaluation.robust
    assert figures["adversarial"] == robust.k
    assert (robust.lower_95, robust.upper_95) == pytest.approx(clopper_pearson(robust.k, robust.n, 0.95))
