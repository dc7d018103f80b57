"""Signed evidence without running a gate: true reports about a real candidate, and real keys."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat
from numpy.typing import NDArray

import dfmcl.cli.command
from dfmcl.common.files import sha256_of
from dfmcl.gating.derivation import derived
from dfmcl.gating.order import FIRST_BLOCK, seed_of
from dfmcl.gating.policy import Policy
from dfmcl.gating.record import GateRecord
from dfmcl.gating.signing.attestation import Trust, sign
from dfmcl.gating.signing.evidence import ATTESTATION, MANIFEST, PROBES, REPORT_FORMAT, candidate_files
from dfmcl.gating.signing.keys import keygen, read_public, read_signer
from dfmcl.gating.signing.probes_file import as_npz
from dfmcl.gating.signing.report import CandidateEntry, CheckEntry, CodeEntry, DataEntry, InputEntry, Report, RunEntry
from dfmcl.robustness.attacks.suites import carried_by, parameters_of
from dfmcl.robustness.reasons import REASONS
from dfmcl.robustness.records import AttackRecord, Evaluation
from dfmcl.robustness.seeds import derived_seed
from dfmcl.robustness.threats.registry import parse_threat, threat_of
from tests.findings import finding

CREATED = "2026-01-02T03:04:05+00:00"
VALID_DAYS = 36500  # tests that are not about expiry must not expire
CRITERIA = ("robust_accuracy >= 0.45 at 95 %", "clean_accuracy >= 0.5 at 95 %")
IMAGES = 40
Array = NDArray[Any]


def make_key(folder: Path, name: str = "release") -> Path:
    """A new key pair; returns the private one's path."""
    folder.mkdir(parents=True, exist_ok=True)
    keygen(folder / name)
    return folder / f"{name}.key"


def ec_key(folder: Path, name: str = "model") -> Path:
    """A new pair of P-256 in PEM; the private one's path."""
    return kept_key(folder / f"{name}.key", ec.generate_private_key(ec.SECP256R1()))


def known_key(folder: Path) -> Path:
    """A key pair that is the same in every run, so that a gate draws the same order; the private one's path."""
    return kept_key(folder / "release.key", Ed25519PrivateKey.from_private_bytes(bytes(range(32))))


def kept_key(path: Path, key: ec.EllipticCurvePrivateKey | Ed25519PrivateKey) -> Path:
    """Both halves in PEM, the public one beside the private one; the private one's path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    public = key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    path.with_suffix(".pub").write_bytes(public)
    return path


def trusting(*keys: Path, **options: Any) -> Trust:
    """Trust in the public halves of these private keys."""
    return Trust(tuple(read_public(key.with_suffix(".pub")) for key in keys), **options)


def write_trust(key: Path) -> Path:
    """A trust file beside a key that trusts it alone, by any policy; returns its path."""
    path = key.with_suffix(".toml")
    path.write_text(f'keys = ["{key.with_suffix(".pub").name}"]\n')
    return path


def policy_of(criteria: Sequence[str] = CRITERIA, **changes: Any) -> Policy:
    """The policy of these reports, which attacks all images once."""
    text = {
        "criteria": list(criteria),
        "statistics": "fixed",
        "valid_days": VALID_DAYS,
        "threat": {"eps": "38/255"},
        "data": {"name": "digits"},
        "attacks": {"suite": ["fgsm"], "substitute": 0},
    }
    return Policy.of_text(text | changes)


POLICY = policy_of().digest


def evaluated(correct: Array, held: Array, eps: str = "38/255", about: Mapping[str, Any] | None = None) -> Evaluation:
    """One attack on images: `correct` `(N,)` were right, and `held` `(N,)` are so still."""
    right, kept = tuple(correct.tolist()), tuple((correct & held).tolist())
    passes = tuple(int(tried) for tried in right)
    attack = AttackRecord("fgsm", {}, kept, right, 0, 0.1, 0, passes, passes)
    return Evaluation(threat_of("linf", eps), True, 0, right, (attack,), 0.1, about or {"kind": "white-box"})


def corrupted(correct: Array, held: Array, spelling: str) -> Evaluation:
    """The same under one corruption such as `fog@3`."""
    found = evaluated(correct, held)
    return replace(
        found, threat=parse_threat(spelling), attacks=(replace(found.attacks[0], name="grid", parameters={}),)
    )


def checked(**outcomes: str) -> list[CheckEntry]:
    """A row of every check: clear, but for these outcomes and what nobody says of the training."""
    outcomes = {**dict.fromkeys(REASONS, "clear"), "seen_images": "not_run", **outcomes}
    return [finding(name, outcome) for name, outcome in outcomes.items()]


def in_cascade(evaluations: Sequence[Evaluation], sources: Sequence[str], attacks: Sequence[str]) -> list[Evaluation]:
    """The same, smallest ball first, as the gate records them: each attack sees what is left, the last from `sources`,
    which break nothing. In threats that are no such balls, everything is left, and no source helps."""
    whole, found = np.array(evaluations[0].correct, bool), []
    left = whole
    for one in evaluations:
        other, records = one.threat.kind != evaluations[0].threat.kind, []
        left = whole if other else left
        for attack in one.attacks:
            tried, left = left, left & np.array(attack.held, bool)
            passes = tuple(tried.astype(int).tolist())
            held, shown = tuple(left.tolist()), tuple(tried.tolist())
            own = parameters_of(attack.name)[1]
            records.append(
                replace(attack, parameters=own, held=held, tried=shown, forward=passes, backward=passes, unconfirmed=0)
            )
        passes = tuple(map(int, records[-1].held))
        last = replace(records[-1], tried=records[-1].held, forward=passes, backward=passes)
        named = [] if other else [f"{name} from {source}" for source in sources for name in attacks]
        records += [replace(last, name=name, parameters=carried_by(name)) for name in named]
        found.append(replace(one, attacks=tuple(records)))
    return found


def true_report(
    probes: Mapping[str, Array],
    files: Mapping[str, str],
    *,
    policy: Policy | None = None,
    checks: Sequence[CheckEntry] | None = None,
    run: RunEntry | None = None,
    **changes: Any,
) -> Report:
    """The report of a gate whose attacks led to these probes, about a candidate of these files.

    changes: of the record behind it.
    """
    policy, labels = policy or policy_of(), np.asarray(probes["labels"], np.int64)
    clean, adversarial = (probes[key].argmax(axis=1) == labels for key in ("clean_logits", "adversarial_logits"))
    classes = [str(number) for number in range(probes["clean_logits"].shape[1])]
    about: dict[str, Any] = {
        "policy": policy,
        "data_sha256": "d" * 64,
        "model_sha256": files["model.onnx"],
        "grid": True,
        "population": len(labels),
        "classes": classes,
        "class_images": np.bincount(labels, minlength=len(classes)).tolist(),
        "labels": labels,
        "evaluations": [evaluated(clean, adversarial)],
        "transfer": [],
        "checks": checked() if checks is None else checks,
    }
    about |= changes
    sources = [one.about["surrogate"] for one in about["transfer"]]
    seed = seed_of(policy.seed, about.get("draw"))
    found = in_cascade(about["evaluations"], sources, policy.attacks.transfer)
    about["evaluations"] = [replace(one, seed=derived_seed(seed, *FIRST_BLOCK)) for one in found]
    about["transfer"] = [replace(one, seed=seed) for one in about["transfer"]]
    record = GateRecord(**about)
    return Report(
        **vars(derived(record)),
        format=REPORT_FORMAT,
        checks=tuple(record.checks),
        candidate=CandidateEntry(
            kind="candidate",
            name="candidate",
            model_sha256=record.model_sha256,
            files=dict(files),
            input=InputEntry(dtype="uint8", layout="NHWC", shape=probes["images"].shape[1:]),
        ),
        run=run or RunEntry(checkpoint_sha256="c" * 64),
        data=DataEntry(
            name="digits",
            sha256=record.data_sha256,
            part="test",
            images=record.population,
            classes=tuple(record.classes),
        ),
        files={PROBES: hashlib.sha256(as_npz(probes)).hexdigest()},
        code=CodeEntry(revision="e" * 40),
        versions={"python": "3.11.7"},
        hardware={"machine": "x86_64"},
        seconds=0.1,
        processes=1,
        created=CREATED,
    )


def probes_of(shape: Sequence[int], classes: int, images: int = IMAGES) -> dict[str, Array]:
    """The record that a gate would keep of so many black images, all answered right; the first one fell."""
    labels = np.arange(images) % classes
    logits = 8 * np.eye(classes, dtype=np.float32)
    adversarial = logits[labels]
    adversarial[0] = logits[(labels[0] + 1) % classes]
    pictures = np.zeros((images, *shape), np.uint8)
    change = pictures.copy()
    change[:1] = 1
    return {
        "images": pictures,
        "change": change,
        "labels": labels,
        "clean_logits": logits[labels],
        "adversarial_logits": adversarial,
    }


OTHER: dict[str, dict[str, Any]] = {
    "passed": {},
    "failed": {"criteria": ["robust_accuracy >= 0.9999 at 95 %"], "wrong": True},
    "inconclusive": {"criteria": [CRITERIA[0], "clean_accuracy >= 0.99999 at 95 %"]},
    "suspect": {"checks": checked(outputs_differ="raised")},
}


def report_on(candidate: Path, evidence: Path, verdict: str = "passed", **changes: Any) -> Report:
    """A true report of a verdict about a candidate on disk, and its probes.npz in the evidence directory.

    Images and answers are those of the probes that lie there, if any do; as nobody knows their labels, the model's
    own answers are the labels (or never are, where it failed).
    """
    manifest, path, wanted = json.loads((candidate / MANIFEST).read_text()), evidence / PROBES, dict(OTHER[verdict])
    if path.exists():
        with np.load(path) as archive:
            probes = {name: archive[name] for name in archive.files}
        probes["labels"] = probes["clean_logits"].argmax(axis=1)
    else:
        probes = probes_of(manifest["input"]["shape"], len(manifest["labels"]))
    if wanted.pop("wrong", False):
        probes["labels"] = (probes["clean_logits"].argmax(axis=1) + 1) % probes["clean_logits"].shape[1]
        probes["adversarial_logits"] = probes["clean_logits"]
    if criteria := wanted.pop("criteria", None):
        wanted["policy"] = policy_of(criteria)
    path.write_bytes(as_npz(probes))
    wanted |= {"run": RunEntry(**manifest.get("run", {})), "classes": manifest["labels"]}
    report = true_report(probes, candidate_files(candidate), **(wanted | changes))
    assert "policy" in changes or report.verdict == verdict
    return report


def code_of(*arguments: str) -> object:
    """The exit code of a `dfmcl` command, run in this process."""
    with pytest.raises(SystemExit) as ended:
        dfmcl.cli.command.app(list(arguments), standalone_mode=False)
    return ended.value.code


def write_report(evidence: Path, report: Report, *keys: Path) -> Path:
    """report.json, and the attestation where keys are given, in an evidence directory that holds its probes."""
    (evidence / "report.json").write_text(json.dumps(report.to_json()))
    if keys:
        signers = [read_signer(key) for key in keys]
        digest = sha256_of(evidence / "report.json")
        signed = sign(report, digest, signers, expires_days=report.policy.valid_days)
        (evidence / ATTESTATION).write_text(signed)
    return evidence


def sign_again(evidence: Path, key: Path, **changes: Any) -> None:
    """Evidence with other top-level entries in its report, and a signature that fits them, as nobody should give it."""
    report = json.loads((evidence / "report.json").read_text()) | changes
    report["files"] = {name: sha256_of(evidence / name) for name in report["files"]}
    write_report(evidence, Report.from_json(report), key)
