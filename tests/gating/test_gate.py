"""The gate on real candidates: its verdicts, its evidence, and what it refuses."""

from __future__ import annotations

import json
import shutil
from importlib import resources
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import onnxruntime
import pytest

from gating import gate as gate_module
from gating.attestation import BadEvidence, NotAttested, verify
from gating.gate import gate
from gating.policy import Policy
from gating.report import markdown
from robustness.attacks import Attack
from robustness.data import load_dataset
from robustness.errors import BadInput
from robustness.evaluate import evaluate
from robustness.runs import load_run
from robustness.threat import Threat
from serving.export import export


def policy(robust: float, eps: str = "2/255", images: int = 120) -> Policy:
    return Policy.model_validate(
        {
            "criteria": [f"robust_accuracy >= {robust} at 95 %", "clean_accuracy >= 0.5 at 95 %"],
            "threat": {"eps": eps},
            "data": {"name": "digits", "images": images},
            "attacks": {"suite": ["fgsm", "pgd-5"]},
        }
    )


@pytest.fixture(scope="module")
def candidate(standard_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("gate") / "candidate"
    export(standard_run, out)
    return out


@pytest.fixture(scope="module")
def passed(candidate: Path, standard_run: Path) -> Path:
    out = candidate.parent / "passed"
    assert gate(candidate, standard_run, policy(0.1), out)["verdict"] == "passed"
    return out


def report_of(evidence: Path) -> dict[str, Any]:
    report: dict[str, Any] = json.loads((evidence / "report.json").read_text())
    return report


@pytest.mark.parametrize(
    ("robust", "eps", "verdict", "code"),
    [(0.1, "2/255", "passed", 0), (0.5, "60/255", "failed", 1), (0.6, "1/255", "inconclusive", 3)],
)
def test_verdicts(
    candidate: Path, standard_run: Path, tmp_path: Path, robust: float, eps: str, verdict: str, code: int
) -> None:
    """A modest claim passes, an impossible one fails, a claim that 5 images cannot settle is inconclusive."""
    images = 5 if verdict == "inconclusive" else 120
    report = gate(candidate, standard_run, policy(robust, eps, images), tmp_path / "evidence")
    assert (report["verdict"], report["exit_code"]) == (verdict, code), report["criteria"]


def test_report_follows_its_schema(passed: Path) -> None:
    """report.json validates against the packaged JSON Schema, and a changed one does not."""
    schema = json.loads((resources.files("gating") / "report.schema.json").read_text())
    report = report_of(passed)
    jsonschema.Draft202012Validator.check_schema(schema)
    jsonschema.validate(report, schema)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({**report, "verdict": "fine"}, schema)


def test_page_says_what_the_report_says(passed: Path) -> None:
    """report.md is the report as a page, the verdict first."""
    page = (passed / "report.md").read_text()
    assert page == markdown(report_of(passed))
    assert page.startswith("### PASSED")


def test_probes_replay_on_the_artefact(candidate: Path, passed: Path) -> None:
    """The adversarial bytes lie in the ball and give the recorded logits when sent through ONNX Runtime again."""
    report = report_of(passed)
    with np.load(passed / "probes.npz") as probes:
        session = onnxruntime.InferenceSession(candidate / "model.onnx", providers=["CPUExecutionProvider"])
        for images, logits in (("images", "clean_logits"), ("adversarial", "adversarial_logits")):
            (again,) = session.run(["logits"], {"images": probes[images]})
            assert np.allclose(again, probes[logits], atol=1e-4)
        assert np.abs(probes["adversarial"].astype(int) - probes["images"].astype(int)).max() <= 2
        held = (probes["clean_logits"].argmax(1) == probes["labels"]) & (
            probes["adversarial_logits"].argmax(1) == probes["labels"]
        )
    assert "".join("01"[int(flag)] for flag in held) == report["evaluation"]["per_image"]["robust"]
    assert held.sum() == report["evaluation"]["robust"]["k"] < report["evaluation"]["clean"]["k"]


def test_gate_is_repeatable(candidate: Path, standard_run: Path, passed: Path, tmp_path: Path) -> None:
    """The same bytes under the same policy give the same per-image record."""
    again = gate(candidate, standard_run, policy(0.1), tmp_path / "evidence")
    assert again["evaluation"]["per_image"] == report_of(passed)["evaluation"]["per_image"]


def test_tampered_candidate_is_not_judged(candidate: Path, standard_run: Path, tmp_path: Path) -> None:
    """One flipped byte: bad input, no evidence."""
    tampered = tmp_path / "candidate"
    shutil.copytree(candidate, tampered)
    model = bytearray((tampered / "model.onnx").read_bytes())
    model[len(model) // 2] ^= 1
    (tampered / "model.onnx").write_bytes(model)
    with pytest.raises(BadEvidence, match=r"model\.onnx: SHA-256 is"):
        gate(tampered, standard_run, policy(0.1), tmp_path / "evidence")
    assert not (tmp_path / "evidence").exists()


def test_gradients_must_come_from_the_exported_run(candidate: Path, other_run: Path, tmp_path: Path) -> None:
    """Another run's gradients aim at another model: refused."""
    with pytest.raises(BadInput, match="name the run that the candidate was exported from"):
        gate(candidate, other_run, policy(0.1), tmp_path / "evidence")


def test_wrong_gradients_make_the_evidence_suspect(
    candidate: Path, standard_run: Path, other_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Were the digests to match all the same, disagreement on adversarial images is noticed: exit code 4."""
    monkeypatch.setattr(gate_module, "_same_run", lambda *arguments: None)
    report = gate(candidate, other_run, policy(0.1), tmp_path / "evidence")
    assert (report["verdict"], report["exit_code"]) == ("suspect", 4)
    assert report["findings"][0]["check"] == "artefact_disagrees"


def test_data_that_does_not_fit_is_bad_input(candidate: Path, standard_run: Path, tmp_path: Path) -> None:
    """More images than the test part has, or images of another shape: one line that names the key."""
    with pytest.raises(BadInput, match=r"data\.images is 5000"):
        gate(candidate, standard_run, policy(0.1, images=5000), tmp_path / "evidence")


def test_existing_directory_of_somebody_else_is_left_alone(candidate: Path, standard_run: Path, tmp_path: Path) -> None:
    """Evidence replaces evidence, an export an export, and neither a run, a release or anybody's files."""
    (tmp_path / "keep.txt").write_text("mine")
    with pytest.raises(BadInput, match=r"holds keep\.txt, which this command did not write"):
        gate(candidate, standard_run, policy(0.1), tmp_path)
    assert (tmp_path / "keep.txt").read_text() == "mine"
    with pytest.raises(BadInput, match="did not write"):
        export(standard_run, standard_run)
    assert (standard_run / "checkpoint.safetensors").exists()
    release = tmp_path / "1"
    shutil.copytree(candidate, release)
    (release / "report.json").write_text("{}")
    for overwrite in (
        lambda: export(standard_run, release),
        lambda: gate(candidate, standard_run, policy(0.1), release),
    ):
        with pytest.raises(BadInput, match="did not write"):
            overwrite()


def test_evidence_replaces_evidence(candidate: Path, standard_run: Path, passed: Path, tmp_path: Path) -> None:
    """The same directory can be judged into again; nothing staged stays beside it."""
    shutil.copytree(passed, tmp_path / "evidence")
    (tmp_path / "evidence" / "report.md").write_text("old")
    gate(candidate, standard_run, policy(0.1), tmp_path / "evidence")
    assert (tmp_path / "evidence" / "report.md").read_text().startswith("### PASSED")
    assert [path.name for path in tmp_path.iterdir()] == ["evidence"]


def test_an_l2_gate_blocks_what_falls_in_float(candidate: Path, standard_run: Path, tmp_path: Path) -> None:
    """Going to bytes does not undo an L2 attack: what breaks the plain model in float breaks it as bytes."""
    wanted = policy(0.5, images=60).model_dump()
    wanted["threat"] = {"norm": "l2", "eps": "2.0"}
    for suite in (["cw-l2"], ["margin-pgd-20"]):
        wanted["attacks"] = {"suite": suite}
        report = gate(candidate, standard_run, Policy.model_validate(wanted), tmp_path / "evidence")
        trained, data = load_run(standard_run), load_dataset("digits")
        attacks = [Attack.parse(name) for name in suite]
        chosen = np.random.default_rng(0).permutation(450)[:60]
        outcome = evaluate(trained.model, data.x_test[chosen], data.y_test[chosen], Threat("l2", 2.0), attacks)
        assert outcome.evaluation.robust.value <= 0.05
        # Towards x instead of to the nearest byte, cw-l2 would leave 97 % standing; 3 of 60 images may differ.
        assert report["evaluation"]["robust"]["k"] <= outcome.evaluation.robust.k + 3
        assert report["verdict"] == "failed"


def test_tampered_probes_are_refused(candidate: Path, passed: Path, tmp_path: Path) -> None:
    """probes.npz is bound to the report: production replays nothing that the gate did not write."""
    changed = tmp_path / "evidence"
    shutil.copytree(passed, changed)
    (changed / "probes.npz").write_bytes(b"garbage")
    with pytest.raises(NotAttested, match=r"probes\.npz: is not what the gate wrote"):
        verify(candidate, changed)


@pytest.mark.parametrize("change", [{"candidate": []}, {"files": None}, {"candidate": {"files": []}}])
def test_malformed_report_is_bad_input(candidate: Path, passed: Path, tmp_path: Path, change: dict[str, Any]) -> None:
    """A report of the right format but the wrong shape gives a message, never a traceback or a pass."""
    changed = tmp_path / "evidence"
    shutil.copytree(passed, changed)
    (changed / "report.json").write_text(json.dumps({**report_of(passed), **change}))
    with pytest.raises((BadEvidence, NotAttested)):
        verify(candidate, changed)


def test_only_passing_evidence_for_these_bytes_attests(candidate: Path, passed: Path, tmp_path: Path) -> None:
    """verify() returns the report for the right pair, and refuses another verdict, other bytes, or no report."""
    assert verify(candidate, passed)["verdict"] == "passed"
    changed = tmp_path / "evidence"
    shutil.copytree(passed, changed)
    report = report_of(passed)
    (changed / "report.json").write_text(json.dumps({**report, "verdict": "failed"}))
    with pytest.raises(NotAttested, match="verdict is 'failed'"):
        verify(candidate, changed)
    files = {**report["candidate"]["files"], "model.onnx": "0" * 64}
    (changed / "report.json").write_text(json.dumps({**report, "candidate": {"files": files}}))
    with pytest.raises(NotAttested, match="made for other bytes"):
        verify(candidate, changed)
    (changed / "report.json").write_text("{")
    with pytest.raises(BadEvidence, match="not readable as JSON"):
        verify(candidate, changed)
    (changed / "report.json").unlink()
    with pytest.raises(BadEvidence, match="No such file"):
        verify(candidate, changed)
