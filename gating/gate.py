"""From evidence to a verdict: attack the candidate as its users will meet it, as bytes through ONNX Runtime."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gating.attestation import read_candidate
from gating.policy import Policy
from gating.report import build_report, markdown
from gating.verdict import decide, judge
from robustness.attacks import Attack
from robustness.data import Bytes, load_dataset
from robustness.errors import BadInput, Broken
from robustness.evaluate import Outcome, evaluate
from robustness.files import dump_json, sha256_of, whole_directory
from robustness.models import to_bytes, to_float
from robustness.progress import Track, silent
from robustness.provenance import now, provenance
from robustness.runs import Run, load_run

# Share of adversarial images on which artefact and checkpoint must give the same label. Attacks leave images at the
# decision border, where one rounding can tip a label; a wrong export disagrees on far more than one in a hundred.
MIN_AGREEMENT = 0.99


def gate(candidate: Path, run: Path, policy: Policy, out: Path, *, track: Track = silent) -> dict[str, Any]:
    """Judge `candidate` by `policy` with gradients from `run`, and write the evidence to `out`. Returns the report."""
    manifest = read_candidate(candidate)
    trained = load_run(run)
    attacks = [Attack.parse(name) for name in policy.attacks.suite]
    _same_run(candidate, manifest, trained)
    data = load_dataset(policy.data.name, policy.data.path, policy.data.image_size, track)
    if data.input_shape != trained.input_shape or data.classes != trained.classes:
        raise BadInput(
            f"policy data {policy.data.name}: images {data.input_shape} with {len(data.classes)} classes do not fit the"
            f" model's {trained.input_shape} with {len(trained.classes)}; check data in the policy"
        )
    chosen = np.random.default_rng(policy.seed).permutation(len(data.x_test))[: policy.data.images or None]
    if policy.data.images > len(data.x_test):
        raise BadInput(
            f"policy data.images is {policy.data.images}; {policy.data.name} has {len(data.x_test)} test images"
        )
    images, labels = data.x_test[chosen], data.y_test[chosen]
    model = (candidate / "model.onnx").read_bytes()
    if hashlib.sha256(model).hexdigest() != manifest["files"]["model.onnx"]:
        raise BadInput(f"{candidate / 'model.onnx'}: changed while it was read; export the candidate again")
    with whole_directory(out, names=("report.json", "report.md", "probes.npz")) as staged:
        outcome = evaluate(
            trained.model,
            images,
            labels,
            policy.parsed_threat,
            attacks,
            decide=artefact(model, candidate),
            grid=True,
            cascade=True,
            seed=policy.seed,
            track=track,
        )
        shares = {"clean_accuracy": outcome.evaluation.clean, "robust_accuracy": outcome.evaluation.robust}
        judgements = [judge(criterion, shares[criterion.metric]) for criterion in policy.parsed_criteria]
        findings = disagreement(trained, outcome)
        (staged / "probes.npz").write_bytes(probes(images, labels, outcome))
        report = build_report(
            verdict=decide(judgements, findings),
            judgements=judgements,
            findings=findings,
            policy=policy,
            candidate={"model_sha256": manifest["files"]["model.onnx"], "files": manifest["files"]},
            run={"checkpoint_sha256": trained.checkpoint_sha256},
            data={**data.describe(), "part": "test", "images": len(images)},
            evaluation=outcome.evaluation.to_json(),
            provenance=provenance(),
            created=now(),
            files={"probes.npz": sha256_of(staged / "probes.npz")},
        )
        (staged / "report.md").write_text(markdown(report), encoding="utf-8")
        (staged / "report.json").write_text(dump_json(report), encoding="utf-8")
    return report


def artefact(model: bytes, where: Path) -> Callable[[Tensor], Tensor]:
    """The exported model as the decider: float images on the uint8 grid, sent as bytes through ONNX Runtime."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    # torch computes between two calls, on the same cores: idle threads must sleep, not spin.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    try:
        session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # noqa: BLE001  # onnxruntime raises its own unrelated classes
        raise Broken(f"{where}: ONNX Runtime cannot load it: {str(error).splitlines()[0]}") from None

    def decide(x: Tensor) -> Tensor:
        (logits,) = session.run(["logits"], {"images": to_bytes(x).cpu().numpy()})
        return torch.from_numpy(logits)

    return decide


def disagreement(run: Run, outcome: Outcome) -> list[dict[str, str]]:
    """Raised where the checkpoint that gave gradients labels adversarial images unlike the artefact that decided."""
    with torch.no_grad():
        x = torch.from_numpy(outcome.adversarial)
        own = torch.cat([run.model(to_float(part)).argmax(dim=1) for part in torch.split(x, 256)]).numpy()
    agreement = float((own == outcome.adversarial_logits.argmax(axis=1)).mean())
    if agreement >= MIN_AGREEMENT:
        return []
    return [
        {
            "check": "artefact_disagrees",
            "why": f"checkpoint and ONNX file give the same label on {100 * agreement:.1f} % of the adversarial images,"
            f" less than {100 * MIN_AGREEMENT:g} %: the attacks did not aim at what is served",
            "do": "export the run again and gate the new candidate",
        }
    ]


def probes(images: Bytes, labels: np.ndarray[Any, Any], outcome: Outcome) -> bytes:
    """probes.npz: images and adversarial bytes `(N, H, W, C)` uint8, labels, and the artefact's logits on both."""
    buffer = io.BytesIO()
    np.savez_compressed(
        buffer,
        images=images,
        adversarial=outcome.adversarial,
        labels=labels,
        clean_logits=outcome.clean_logits,
        adversarial_logits=outcome.adversarial_logits,
    )
    return buffer.getvalue()


def _same_run(candidate: Path, manifest: dict[str, Any], run: Run) -> None:
    named = manifest.get("run", {}).get("checkpoint_sha256")
    if named != run.checkpoint_sha256:
        raise BadInput(
            f"{run.path}: its checkpoint is {run.checkpoint_sha256[:12]}..., {candidate} was exported from"
            f" {str(named)[:12]}...; name the run that the candidate was exported from"
        )
