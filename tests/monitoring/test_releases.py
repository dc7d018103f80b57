"""The gate's evidence as the watch reads it: of the version that answers, believed as far as it can be verified."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest

from dfmcl.common.errors import BadInput
from dfmcl.common.files import sha256_of
from dfmcl.gating.gate import gate
from dfmcl.gating.policy import load_policy
from dfmcl.gating.signing.probes_file import as_npz
from dfmcl.gating.signing.report import RunEntry
from dfmcl.gating.signing.trust import follow_trust
from dfmcl.gating.subjects.registry import open_subject
from dfmcl.gating.verdict import EXIT_CODES
from dfmcl.monitoring.releases import STATES, Release, Replay, always, follow, nothing, read_replay, read_report
from dfmcl.monitoring.surrogates import load_surrogates
from dfmcl.release import promotion
from dfmcl.release.stores.bucket import BucketStore
from dfmcl.release.stores.directory import Directory
from dfmcl.robustness.attacks.suites import carried_by
from dfmcl.robustness.data import load_dataset
from dfmcl.robustness.records import Evaluation
from dfmcl.robustness.runs import load_run
from dfmcl.robustness.statistics import Share
from dfmcl.robustness.threats.registry import threat_of
from tests.monitoring.passed import GATED, write_probes
from tests.release.bucket import Objects
from tests.signing import evaluated, make_key, policy_of, report_on, trusting, write_trust
from tests.signing import write_report as write_evidence

MakeReport = Callable[..., Path]


def test_the_figures_are_those_of_the_report(make_report: MakeReport) -> None:
    """Verdict, digests, strictest thresholds at the release's radius, counts, ball and time are read as written."""
    found = read_report(make_report("ab" * 32))
    assert (found.state, found.checkpoint_sha256) == ("passed", "ab" * 32)
    assert (found.model_sha256, found.policy_sha256) == ("e" * 64, policy_of(GATED).digest)
    assert (found.robust_threshold, found.clean_threshold) == (0.45, 0.9)
    assert (found.clean, found.robust) == (Share(97, 100), Share(55, 100))
    assert (found.norm, found.epsilon) == ("linf", "38/255")
    assert found.evaluated == datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC).timestamp()
    assert found.transfer == {}


def transferred(surrogates: str, eps: str, images: int = 100, norm: str = "linf", **attacks: int) -> Evaluation:
    """An entry of the report's transfer: 90 % right, and so many images that each attack left."""
    right = np.arange(images) < 0.9 * images
    about = {"kind": "transfer", "surrogate": "other", "surrogate_sha256": surrogates}
    parts = {name: evaluated(right, np.arange(images) < k, eps, about) for name, k in attacks.items()}
    records = tuple(replace(one.attacks[0], name=name, parameters=carried_by(name)) for name, one in parts.items())
    one = next(iter(parts.values()))
    return replace(one, threat=threat_of(norm, eps), attacks=records)


def test_clean_accuracy_is_that_of_the_most_images(make_report: MakeReport) -> None:
    """The gate asks about more images for transfer than it attacks: what is clean there is known better."""
    assert read_report(make_report(transfer=[transferred("a" * 64, "38/255", 1000, fgsm=70)])).clean == Share(900, 1000)
    assert read_report(make_report(transfer=[transferred("a" * 64, "38/255", 10, fgsm=7)])).clean == Share(97, 100)


def test_transfer_figures_are_known_by_surrogates_and_attack(make_report: MakeReport) -> None:
    """Of the policy's own ball; the same attack on other surrogates is another figure."""
    entries = [
        transferred("a" * 64, "38/255", fgsm=70, pgd=60),
        transferred("b" * 64, "38/255", fgsm=80),
        transferred("a" * 64, "8/255", fgsm=85),
        transferred("a" * 64, "0.5", norm="l2", fgsm=85),
    ]
    assert read_report(make_report(transfer=entries)).transfer == {
        ("a" * 64, "fgsm"): Share(70, 100),
        ("a" * 64, "pgd"): Share(60, 100),
        ("b" * 64, "fgsm"): Share(80, 100),
    }


def test_every_verdict_is_a_state() -> None:
    """The sidecar may not import the gate's rules, so it spells the verdicts out; the report's schema, too."""
    schema = json.loads((resources.files("dfmcl.gating") / "report.schema.json").read_text())
    assert list(STATES[: len(EXIT_CODES)]) == list(EXIT_CODES) == schema["properties"]["verdict"]["enum"]


def test_a_report_of_the_real_gate_is_understood(tmp_path: Path, exported: tuple[Path, Path], surrogate: Path) -> None:
    """What the gate writes today is what the watch reads: no figure and no answer is lost between the rooms."""
    (run, candidate), policy = exported, tmp_path / "gate.toml"
    policy.write_text(
        """
        criteria = [
            "robust_accuracy >= 0.4 at 95 %",
            "robust_accuracy(patch:2x2) >= 0.02 at 80 %",
            "robust_accuracy(fog@1) >= 0.02 at 80 %",
            "robust_accuracy(rotation:10) >= 0.02 at 80 %",
        ]
        statistics = "fixed"
        [threat]
        eps = "8.4/255"
        [data]
        name = "digits"
        images = 20
        [attacks]
        suite = ["fgsm"]
        patch = ["patch-5x2"]
        transfer = ["mi-fgsm-2"]
        substitute = 0
        [checks]
        images = 32
        """
    )
    out = tmp_path / "evidence"
    report = gate(
        open_subject(str(candidate), run=run), load_policy(policy), out, surrogates={"other": load_run(surrogate)}
    )
    found = read_report(out)
    assert found.state == report.verdict != "passed"  # its weights are random
    assert found.checkpoint_sha256 == sha256_of(run / "checkpoint.safetensors")
    assert found.model_sha256 == sha256_of(candidate / "model.onnx")
    assert (found.epsilon, found.robust_threshold, found.clean_threshold) == ("8/255", 0.4, None)
    assert (found.robust.n, found.robust.k) == (20, report.evaluation.robust.k)
    [((digest, attack), share)] = found.transfer.items()
    assert (attack, share.n) == ("mi-fgsm-2", 20)
    assert digest == load_surrogates([surrogate], load_dataset("digits")).sha256
    assert {(kind, label): share.n for kind, label, share in found.further} == {
        (entry.threat.parsed.kind, entry.threat.parsed.label): 20 for entry in report.radii
    }
    replay = read_replay(out / "probes.npz", found)
    assert replay is not None
    attacked = len(replay.images) // (2 + len(report.radii))  # clean, at the policy's threat, and at each other
    assert replay.kinds == (
        *[""] * attacked, *(kind for kind, _, _ in found.further for _ in range(attacked)), *[""] * attacked,
    )  # fmt: skip
    assert set(replay.kinds) == {"", "patch", "corruption", "spatial"}
    assert np.allclose(logits_of(candidate, replay.images), replay.logits, atol=1e-4)


def logits_of(candidate: Path, images: np.ndarray) -> np.ndarray:
    """The oracle: ONNX Runtime in this process."""
    session = ort.InferenceSession(candidate / "model.onnx", providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, {"images": images})[0])


def test_a_policy_without_a_clean_criterion_has_no_clean_threshold(make_report: MakeReport) -> None:
    """What the policy does not ask for is not exported as 0."""
    assert read_report(make_report(criteria=["robust_accuracy >= 0.4 at 95 %"])).clean_threshold is None


@pytest.mark.parametrize(
    ("changes", "message"),
    {
        "format": (
            {"format": "dfmcl.report/9"},
            "format is 'dfmcl.report/9'; expected 'dfmcl.report/2'; make it again",
        ),
        "no figures": ({"evaluation": {}}, "not a gate's report (lacks 'evaluation.format'); run dfmcl gate again"),
        "time": ({"created": "today"}, "not a gate's report (Invalid isoformat string: 'today'); run dfmcl gate again"),
        "verdict": ({"verdict": "splendid"}, "verdict is 'splendid', and 'passed' follows from its own record"),
        "counts": ({"progress": []}, "progress: entries is 0, and 16 follows from its own record"),
        "no images": ({"per_image": {"index": [], "label": []}}, "its members do not fit together"),
        "radii": ({"radii": [{}]}, "not a gate's report (lacks 'radii.0.format'); run dfmcl gate again"),
    }.values(),
)
def test_malformed_evidence_is_bad_input(make_report: MakeReport, changes: dict[str, object], message: str) -> None:
    """Evidence that cannot be read, or contradicts itself, is one line with file and reason, exit 2."""
    evidence = make_report(**changes)
    with pytest.raises(BadInput) as caught:
        read_report(evidence)
    assert str(caught.value).startswith(str(evidence))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_missing_evidence_is_bad_input(tmp_path: Path) -> None:
    """A directory without a report is named."""
    with pytest.raises(BadInput, match=r"report\.json: No such file"):
        read_report(tmp_path)


def test_recorded_answers_are_adversarial_ones_first(tmp_path: Path) -> None:
    """They lie at the border, where a difference shows; then the clean ones."""
    images, logits = np.arange(12, dtype=np.uint8).reshape(2, 2, 1, 3), np.array([[1, 2], [3, 4]], np.float32)
    arrays: dict[str, Any] = {"images": images, "change": np.full_like(images, 250), "labels": np.zeros(2)}
    arrays |= {"clean_logits": logits, "adversarial_logits": logits + 9}
    np.savez(tmp_path / "probes.npz", **arrays)
    found = read_replay(tmp_path / "probes.npz")
    assert found is not None
    assert np.array_equal(found.images, np.concatenate([images - 6, images]))
    assert np.array_equal(found.logits, np.concatenate([logits + 9, logits]))
    part = found.part(2, 3)
    assert np.array_equal(part.logits, found.logits[[3, 0, 1]])


def test_every_recorded_answer_has_its_turn() -> None:
    """However many fit into a round, all are asked about before long."""
    recorded = Replay(np.zeros((10, 1, 1, 3), np.uint8), np.arange(10, dtype=np.float32)[:, None])
    for count in (1, 3, 4, 10):
        seen = np.concatenate([recorded.part(number, count).logits[:, 0] for number in range(1, 11)])
        assert set(seen.tolist()) == set(range(10))


@pytest.mark.parametrize("damage", ["truncated", "text", "lacking", "misfit", "compressed"])
def test_a_damaged_archive_is_bad_input(tmp_path: Path, damage: str) -> None:
    """One line with the file, and what to do."""
    path = write_probes(tmp_path, np.zeros((3, 4, 4, 3), np.uint8), np.zeros((3, 2), np.float32)) / "probes.npz"
    if damage == "truncated":
        path.write_bytes(path.read_bytes()[:200])
    elif damage == "compressed":
        data = bytearray(as_npz({"images": np.zeros((3, 4, 4, 3), np.uint8)}))
        data[50:60] = b"\xff" * 10
        path.write_bytes(data)
    elif damage == "text":
        path.write_text("no archive")
    elif damage == "lacking":
        np.savez(path, images=np.zeros((3, 4, 4, 3), np.uint8))
    else:
        write_probes(tmp_path, np.zeros((3, 4, 4, 3), np.float32), np.zeros((3, 2), np.float32))
    with pytest.raises(BadInput, match=r"probes\.npz: .*run dfmcl gate again$"):
        read_replay(path)


def test_an_archive_of_nothing_replays_nothing(tmp_path: Path) -> None:
    """A gate that kept no images."""
    write_probes(tmp_path, np.zeros((0, 4, 4, 3), np.uint8), np.zeros((0, 2), np.float32))
    assert read_replay(tmp_path / "probes.npz") is None
    assert read_replay(tmp_path / "none.npz") is None


def test_one_directory_stands_for_whatever_answers(make_report: MakeReport) -> None:
    """Evidence that was given is not verified, and the same for every version."""
    evidence = make_report()
    find = always(evidence)
    assert find("1") is find("2")
    assert (find("1").state, find("1").verified, find("1").expires) == ("passed", False, None)
    assert find("1").replay is not None


def test_without_evidence_it_is_missing() -> None:
    """And the page says what to name."""
    assert (nothing("1").state, nothing("1").attested) == ("missing", None)
    assert "release.repository" in nothing("1").why


@pytest.fixture(scope="module")
def key(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_key(tmp_path_factory.mktemp("keys"))


@pytest.fixture
def evidence(tmp_path: Path, exported: tuple[Path, Path], key: Path) -> Path:
    """Signed evidence that the exported candidate passed."""
    folder = tmp_path / "evidence"
    folder.mkdir()
    images = load_dataset("digits").x_test[:16]
    write_probes(folder, images, logits_of(exported[1], images))
    checkpoint = RunEntry(checkpoint_sha256=sha256_of(exported[0] / "checkpoint.safetensors"))
    return write_evidence(folder, report_on(exported[1], folder, run=checkpoint), key)


@pytest.fixture
def models(tmp_path: Path, exported: tuple[Path, Path], evidence: Path, key: Path) -> Path:
    """A model repository with one promoted version."""
    promotion.promote(exported[1], evidence, Directory(tmp_path / "models"), name="digits", trust=trusting(key))
    return tmp_path / "models"


def test_what_was_promoted_is_verified(models: Path, key: Path) -> None:
    """Figures, recorded answers, a signature that holds, and until when."""
    found = follow(Directory(models), "digits", lambda: trusting(key))("1")
    assert (found.state, found.verified, found.why) == ("passed", True, "")
    assert found.attested is not None
    assert found.attested.model_sha256 == sha256_of(models / "digits" / "1" / "model.onnx")
    assert found.replay is not None
    assert len(found.replay.images) == 32
    assert found.expires is not None
    assert found.expires > datetime.now(UTC).timestamp()


def test_without_keys_nothing_is_verified(models: Path) -> None:
    """The report is read, and no more is claimed."""
    found = follow(Directory(models), "digits", None)("1")
    assert (found.state, found.verified, found.expires) == ("passed", False, None)


@pytest.mark.parametrize("version", ["2", "999999999"])
def test_a_version_that_nobody_promoted_has_no_evidence(models: Path, key: Path, version: str) -> None:
    """Another model is served."""
    found = follow(Directory(models), "digits", lambda: trusting(key))(version)
    assert (found.state, found.attested, found.replay, found.verified) == ("missing", None, None, False)
    assert f"digits/{version}" in found.why


def tamper_model(version: Path, key: Path) -> None:
    (version / "model.onnx").write_bytes((version / "model.onnx").read_bytes() + b"\0")


def tamper_report(version: Path, key: Path) -> None:
    report = json.loads((version / "report.json").read_text())
    report["criteria"][0]["threshold"] = 0.0
    (version / "report.json").write_text(json.dumps(report))


def tamper_probes(version: Path, key: Path) -> None:
    images = load_dataset("digits").x_test[:4]
    write_probes(version, images, np.zeros((4, 10), np.float32))


def break_report(version: Path, key: Path) -> None:
    (version / "report.json").write_text("{")


def break_probes(version: Path, key: Path) -> None:
    (version / "probes.npz").write_text("no archive")


def remove_signature(version: Path, key: Path) -> None:
    next(version.glob("attestation*")).unlink()


def break_signature(version: Path, key: Path) -> None:
    next(version.glob("attestation*")).write_text('{"payload": 3}')


def sign_a_failure(version: Path, key: Path) -> None:
    write_evidence(version, report_on(version, version, "failed"), key)


@pytest.mark.parametrize(
    "damage",
    [
        tamper_model,
        tamper_report,
        tamper_probes,
        break_report,
        break_probes,
        remove_signature,
        break_signature,
        sign_a_failure,
    ],
)
def test_what_does_not_hold_is_invalid(models: Path, key: Path, damage: Callable[[Path, Path], None]) -> None:
    """Other bytes than were signed, or none that can be read: invalid, with the reason in one line, never an error."""
    damage(models / "digits" / "1", key)
    found = follow(Directory(models), "digits", lambda: trusting(key))("1")
    assert (found.state, found.verified) == ("invalid", False)
    assert found.why
    assert "\n" not in found.why


def test_a_signature_of_a_stranger_is_invalid(models: Path, tmp_path: Path) -> None:
    """A signer with another key."""
    stranger = make_key(tmp_path / "stranger")
    found = follow(Directory(models), "digits", lambda: trusting(stranger))("1")
    assert (found.state, found.verified) == ("invalid", False)


def dated(models: Path, key: Path, **options: Any) -> tuple[Release, float]:
    """The release and the moment it was signed for."""
    found = follow(Directory(models), "digits", lambda: trusting(key, **options))("1")
    assert found.expires is not None
    return found, found.expires


def test_an_attestation_expires_while_it_is_watched(models: Path, key: Path) -> None:
    """Until its last second it holds; from then on it is expired, which is not invalid."""
    found, expires = dated(models, key)
    assert found.at(expires - 1) is found
    later = found.at(expires)
    assert (later.state, later.verified) == ("expired", False)
    assert later.why == f"expired on {datetime.fromtimestamp(expires, UTC):%Y-%m-%d}"
    assert later.attested == found.attested


def test_a_trust_file_may_ask_for_fresher_evidence(models: Path, key: Path) -> None:
    """max_age ends it sooner than the signature does."""
    _, signed = dated(models, key)
    _, asked = dated(models, key, max_age=timedelta(days=7))
    assert asked < signed
    found, _ = dated(models, key, max_age=timedelta(days=7))
    assert found.at(asked + 1).state == "expired"


def test_only_what_passed_can_expire() -> None:
    """What is invalid stays invalid."""
    invalid = Release("invalid", expires=100.0, why="tampered")
    assert invalid.at(200.0) is invalid


def test_files_are_read_again_when_they_change(models: Path, key: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not at every round, as hashing takes time; at once where a file is replaced, and back."""
    reads: list[Path] = []
    real = read_report
    monkeypatch.setattr(
        "dfmcl.monitoring.releases.read_report", lambda directory: (reads.append(directory), real(directory))[1]
    )
    find, model = follow(Directory(models), "digits", lambda: trusting(key)), models / "digits" / "1" / "model.onnx"
    assert find("1") is find("1")
    assert len(reads) == 1
    kept = model.read_bytes()
    model.write_bytes(kept + b"\0")
    assert find("1").state == "invalid"
    model.write_bytes(kept)
    assert find("1").state == "passed"
    assert len(reads) == 3


@pytest.mark.parametrize("away", ["", "digits", "digits/1", "digits/1/report.json", "digits/1/probes.npz"])
def test_storage_that_is_away_contradicts_nothing(models: Path, key: Path, away: str) -> None:
    """What was verified of a version stays so while its files cannot be seen; what nobody has seen is missing."""
    trusted = trusting(key)
    find = follow(Directory(models), "digits", lambda: trusted)
    found = find("1")
    assert found.verified
    path = models / away
    path.rename(models.with_name("elsewhere"))
    assert find("1") is found
    if away != "digits/1/probes.npz":
        assert follow(Directory(models), "digits", lambda: trusted)("1").state == "missing"
    models.with_name("elsewhere").rename(path)
    assert find("1") is found
    (models / "digits" / "1" / "model.onnx").write_bytes(b"other")
    assert find("1").state == "invalid"


def test_evidence_may_lie_in_a_bucket(models: Path, key: Path) -> None:
    """A look is a request; it is read again when it changes, and believed while the bucket is away."""
    objects = Objects()
    with (store := BucketStore(objects)).writing(), store.added("digits") as folder:
        shutil.copytree(models / "digits", folder, dirs_exist_ok=True)
    find = follow(BucketStore(objects), "digits", lambda: trusted)
    trusted = trusting(key)
    found, asked = find("1"), objects.requests
    assert (found.state, found.verified) == ("passed", True)
    assert find("1") is found
    assert objects.requests == asked + 1
    assert find("7").why == "memory://bucket/digits/7: there is no report.json"
    assert find("1").verified
    objects.away = True
    assert find("1").verified
    assert find("7").why == "memory://bucket: the network is down"
    objects.away = False
    with (store := BucketStore(objects)).writing():
        store.replace("digits/1/model.onnx", b"other", store.etag("digits/1/model.onnx"))
    assert find("1").state == "invalid"
    assert "memory://bucket/digits/1" in find("1").why


def test_a_revoked_key_is_not_trusted_any_more(models: Path, key: Path, tmp_path: Path) -> None:
    """The trust file is read again; while it cannot be read, what it said last holds."""
    trust, said = write_trust(key), list[str]()
    find = follow(Directory(models), "digits", follow_trust(trust, said.append))
    found = find("1")
    assert found.verified
    good = trust.read_text()
    for text in ("keys = [", 'keys = ["gone.pub"]', ""):
        trust.write_text(text)
        assert find("1") is found
        assert find("1") is found
    assert len(said) == 3, "each trouble once"
    trust.write_text(f'keys = ["{make_key(tmp_path / "new").with_suffix(".pub")}"]\n')
    assert (find("1").state, find("1").verified) == ("invalid", False)
    trust.write_text(good)
    assert find("1").verified


def test_a_new_version_brings_its_own(models: Path, key: Path) -> None:
    """Version 2 is looked up where version 1 was, and version 1 again after it."""
    find = follow(Directory(models), "digits", lambda: trusting(key))
    one = find("1")
    assert find("2").state == "missing"
    shutil.copytree(models / "digits" / "1", models / "digits" / "2")
    two = find("2")
    assert (two.state, two.verified) == ("passed", True)
    again = find("1")
    assert again is not one
    assert replace(again, replay=None) == replace(one, replay=None)
